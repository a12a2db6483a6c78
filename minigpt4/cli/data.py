"""`minigpt4 data check`, `index` and `features`: examples before training on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt4.cli.console import note, quiet
from minigpt4.cli.options import AsJson, data_app, examples
from minigpt4.cli.progress import counting_bar, parts_bar
from minigpt4.data.sources.formats import NAMES, open_source
from minigpt4.errors import DataError, UsageError
from minigpt4.text import counted

if TYPE_CHECKING:
    from minigpt4.data.record import Record
    from minigpt4.data.sources.checking import SourceCheck, Spread
    from minigpt4.processing import MiniGPT4Processor


BAD_SHARE = 0.01
"""The `max_bad_fraction` of a recipe that says nothing else."""

Text = Annotated[str | None, typer.Option(help="Column or key that holds the caption.", metavar="NAME")]
Where = Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, a file, DIR/{00000..00099}.tar or hub:NAME.")]
Kind = Annotated[str, typer.Option("--format", help=f"{', '.join(NAMES[:-1])} or {NAMES[-1]}.", metavar="KIND")]
Images = Annotated[Path | None, typer.Option(help="Where the pictures lie that a list names.", metavar="DIR")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Count its tokens too.", metavar="MODEL")]
MaxTokens = Annotated[int, typer.Option("--max-text-tokens", min=1, help="Longer answers will be cut off.")]
Sheet = Annotated[
    Path | None, typer.Option("--contact-sheet", help="Write 12 of the pictures with their words.", metavar="FILE.png")
]


@data_app.command(
    epilog=examples(
        "minigpt4 data check pictures/ --contact-sheet sheet.png",
        "minigpt4 data check llava_instruct_150k.json --images train2014 -m nano",
    )
)
def check(
    source: Where,
    kind: Kind = "auto",
    images: Images = None,
    text: Text = None,
    model: Model = None,
    max_text_tokens: MaxTokens = 160,
    contact_sheet: Sheet = None,
    everything: Annotated[bool, typer.Option("--all", help="Look at every record of a large source.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample of a large source.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Count the records of a source and tell what is broken; status 1 if more than 1 % are."""
    if contact_sheet and contact_sheet.suffix.lower() != ".png":
        raise UsageError(
            f"{contact_sheet} is no name for a contact sheet, expected FILE.png", "--contact-sheet sheet.png"
        )
    quiet(hub=source.startswith("hub:") or kind == "hub")
    from minigpt4.data.sources.checking import check_source, write_contact_sheet

    processor = _processor_of(model) if model else None
    count_tokens = _token_counter(processor) if processor else None
    with counting_bar() as report:
        opened = open_source(source, format=kind, images=images, text=text, report=report)
        seen = check_source(
            opened,
            everything=everything,
            seed=seed,
            count_tokens=count_tokens,
            max_text_tokens=max_text_tokens if model else None,
            report=report,
        )
    if contact_sheet and seen.samples:
        write_contact_sheet(contact_sheet, [opened.read(number) for number in seen.samples])
    if as_json:
        print(json.dumps(seen.as_dict(), indent=2))
    else:
        _print_check(seen, contact_sheet)
        for number in seen.samples[:2] if processor else []:
            print(f"  {'read as':<12}{_as_read(opened.read(number), processor, max_text_tokens)}")
    _refuse_too_many_bad(seen)


@data_app.command(epilog=examples("minigpt4 data index laion_dataset/"))
def index(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Holds tar shards, such as 00000.tar.")],
    text: Text = None,
) -> None:
    """Write the index of a folder of tar shards."""
    quiet()
    from minigpt4.data.sources.shards import index_folder

    with counting_bar() as report:
        path, made = index_folder(folder, text=text, report=report)
    found = f"{counted(len(made.rows), 'record')} in {counted(len(made.shards), 'shard')}"
    note(f"{found}, {counted(made.bad, 'bad record')} among them")
    for damage in list(made.damage.values())[:10]:
        note(f"damaged: {damage}")
    for what, count in made.skipped.items():
        note(f"passed over: {count:,} x {what}")
    print(path)


def _refuse_too_many_bad(seen: "SourceCheck") -> None:
    """End with status 1 where a run would stop, unless its recipe allows more."""
    share = seen.bad_share
    if share > BAD_SHARE:
        which = "the records looked at" if seen.seed is None else "all records, by this sample,"
        error = DataError(
            f"{share:.2%} of {which} are bad, `minigpt4 train` stops at more than {BAD_SHARE:.0%}",
            _cure(seen),
        )
        error.exit_status = 1
        raise error


def _cure(seen: "SourceCheck") -> str:
    from minigpt4.data.sources.safe_files import ADDRESS, MISSING_PICTURE, OUTSIDE, WHOLE_PATH

    kind, fault = max(seen.faults.items(), key=lambda item: item[1].count)
    named = "name the folder of the pictures with --images (`images` of a source in a recipe)"
    if 2 * fault.count >= seen.bad and kind == MISSING_PICTURE:
        return f"{named}, or mend the data"
    if 2 * fault.count >= seen.bad and kind == OUTSIDE:
        return f"nothing outside the folder is read, by links neither: {named}, or copy them (cp -rL)"
    if 2 * fault.count >= seen.bad and kind == WHOLE_PATH:
        return "write names that begin in the folder of the pictures"
    if 2 * fault.count >= seen.bad and kind == ADDRESS:
        return "fetch them first, as docs/training.md says (img2dataset)"
    return "mend the data, or raise max_bad_fraction in the recipe"


def _processor_of(model: str) -> "MiniGPT4Processor":
    from minigpt4.weights.folder import load_processor

    with parts_bar() as report:
        return load_processor(model, report=report)


def _as_read(record: "Record", processor: Any, max_text_tokens: int) -> str:  # noqa: ANN401  (a processor)
    """Write a record as a model reads it when it is trained."""
    from minigpt4.data.examples import DEFAULT_PROMPTS, Layout, as_read

    layout = Layout(processor, max_text_tokens=max_text_tokens)
    return as_read(layout.encode(record, DEFAULT_PROMPTS[0]), processor)


def _token_counter(processor: "MiniGPT4Processor") -> Callable[[str], int]:
    """Return what counts the tokens of a text as a model does."""
    from minigpt4.processing.text_encoding import TextEncoder

    encoder = TextEncoder(processor.tokenizer)
    return lambda words: len(encoder.encode(words.strip()))


def _print_check(seen: "SourceCheck", contact_sheet: Path | None) -> None:
    print(f"{seen.source}: {counted(seen.records, 'record')}")
    if seen.seed is None:
        rows = [("looked at", "every record, every picture was decoded")]
    else:
        rows = [
            ("looked at", f"a sample of {seen.sampled:,} (seed {seen.seed}), every picture in it was decoded; --all"),
            ("known bad", f"{seen.known_bad:,} of all, without reading"),
        ]
    rows += [("sound", f"{seen.good:,}, {seen.text_only:,} of them without a picture"), *_sizes(seen)]
    stand = "stands" if seen.same_picture == 1 else "stand"
    rows.append(("repeated", f"{counted(seen.same_picture, 'picture')} {stand} in an earlier record, "
                             f"{seen.same_record:,} with the same words"))  # fmt: skip
    rows += [("passed over", f"{count:,} x {what}") for what, count in seen.skipped.items()]
    of = "of those looked at" if seen.seed is None else "of all, by this sample"
    rows.append(("bad", f"{seen.bad:,}, {seen.bad_share:.2%} {of}" if seen.bad else "none"))
    for kind, fault in seen.faults.items():
        rows.append(("", f"{fault.count:,} x {kind}"))
        rows += [("", f"    {example}") for example in fault.examples]
    if contact_sheet:
        rows.append(("sheet", str(contact_sheet) if seen.samples else "not written, there is nothing to show"))
    for label, value in rows:
        print(f"  {label:<12}{value}")


def _sizes(seen: "SourceCheck") -> list[tuple[str, str]]:
    rows = []
    if seen.widths and seen.heights:
        rows.append(("pictures", f"{_spread(seen.widths)} pixels wide, {_spread(seen.heights)} high"))
    if seen.characters:
        rows.append(("text", f"{_spread(seen.characters)} characters"))
    if seen.tokens:
        rows.append(("tokens", f"{_spread(seen.tokens)}, ends included"))
    if seen.cut is not None:
        rows.append(
            ("cut off", f"{counted(seen.cut, 'answer')} of more than {counted(seen.max_text_tokens or 0, 'token')}")
        )
    if set(seen.turns) - {1}:
        rows.append(("turns", ", ".join(f"{count:,} x {turns}" for turns, count in seen.turns.items())))
    return rows


def _spread(numbers: "Spread") -> str:
    if numbers.minimum == numbers.maximum:
        return f"{numbers.median:,}"
    return f"{numbers.minimum:,} to {numbers.maximum:,} (median {numbers.median:,})"


@data_app.command(
    epilog=examples(
        "minigpt4 data features recipes/minigpt4-stage2.yaml --set data.crop=false",
    )
)
def features(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
) -> None:
    """Compute what a recipe with `features: cache` reads, and print where it is kept."""
    quiet()
    from minigpt4.training.features import compute_features
    from minigpt4.training.model_setup import check_libraries, prepare_model
    from minigpt4.training.processes import joined
    from minigpt4.training.recipe import read_recipe
    from minigpt4.training.stage_data import RunSources, check_data

    settings = read_recipe(recipe, overrides)
    check_libraries(settings)
    with joined() as here:
        with counting_bar("picture") as report, counting_bar() as reading:
            sources = RunSources(reading if here.is_main_process else None)
            check_data(settings, sources)
            with parts_bar() as report_parts:
                prepared = prepare_model(settings, here, report_parts)
            folder, counts = compute_features(settings, prepared, here, report, sources)
        if here.is_main_process:
            known = counted(counts.known, "record")
            note(f"{counted(counts.computed, 'picture')} computed, {known} had theirs, {counts.bad:,} bad")
            if settings.features != "cache":
                note("the recipe says features: compute, so train does not read them: set features=cache there")
            print(folder)
