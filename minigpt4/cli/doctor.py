"""`minigpt4 models` and `minigpt4 doctor`: what there is and what will run, without loading a model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4.cli.console import quiet
from minigpt4.cli.options import AsJson, Device, Dtype, Quantize, app, check_placement, examples
from minigpt4.errors import UsageError
from minigpt4.text import counted

if TYPE_CHECKING:
    from minigpt4.weights.checking.doctor import CheckUp


GIGABYTE = 1e9
LABEL_WIDTH = 14

Beams = Annotated[int, typer.Option("--num-beams", min=1, help="Answers followed at once.")]
Context = Annotated[
    int | None, typer.Option(min=1, help="Tokens of conversation and answer; default 2048, or less if it reads less.")
]
CheckWeights = Annotated[
    bool | None,
    typer.Option(
        "--check-weights/--no-check-weights", help="Look at the language model's numbers; default up to 1 GB."
    ),
]
OriginalsYaml = Annotated[Path | None, typer.Option("--cfg-path", metavar="FILE.yaml", hidden=True)]
WantedModel = Annotated[
    str, typer.Option("--model", "-m", help="nano, or a model, alignment or language model folder.")
]


@app.command(epilog=examples("minigpt4 models", "minigpt4 models --json"))
def models(as_json: AsJson = False) -> None:
    """List the models, their parts and needs."""
    from minigpt4.weights.checking.models import list_models

    rows = list_models()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']}: {row['description']}")
        for part in row["parts"]:
            licence = part["licence"] or "licence not stated"
            print(f"  {part['role']}: {part['name']}, {licence}, {_rounded(part['megabytes'])}, {part['state']}")
        print(f"  memory: about {row['memory_gigabytes']} GB; kept in {row['folder']}")


def _rounded(megabytes: float) -> str:
    return f"{megabytes:,.0f} MB" if megabytes >= 1 else f"{megabytes * 1e3:,.0f} kB"


def print_rows(rows: list[tuple[str, str]]) -> None:
    """Print labels and texts in two columns; a label that repeats is shown once, an empty text not at all."""
    before = ""
    for label, text in rows:
        if text:
            print(f"  {'' if label == before else label:<{LABEL_WIDTH}}{text}")
            before = label


@app.command(
    epilog=examples(
        "minigpt4 doctor",
        "minigpt4 doctor -m models/minigpt4-7b --device cuda --dtype float16 --num-beams 5",
        "minigpt4 doctor -m vicuna-7b --check-weights",
    )
)
def doctor(
    model: WantedModel = "nano",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    num_beams: Beams = 1,
    context: Context = None,
    check_weights: CheckWeights = None,
    cfg_path: OriginalsYaml = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether a model will run here, before anything is loaded, and what to change if not."""
    if cfg_path is not None:
        raise UsageError(
            "doctor looks at model folders, not at the original's YAML files",
            f"make one with `minigpt4 weights import -o DIR --cfg-path {cfg_path}` (--dry-run checks the files alone), "
            "then `minigpt4 doctor -m DIR`",
        )
    check_placement(device, dtype, quantize)
    if not model.strip():
        raise UsageError("the model's name is empty", "name nano, or a folder")
    quiet()
    from minigpt4.weights.checking.doctor import check_up

    found = check_up(
        model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        num_beams=num_beams,
        context=context,
        check_weights=check_weights,
    )
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print_check_up(found)
    if found.problems:
        raise found.problems[0]


def _print_check_up(found: "CheckUp") -> None:
    facts = found.as_dict()
    right = [library for library in found.libraries if library.fits]
    named = [f"{library.name} {library.version}" for library in right if library.name in ("torch", "transformers")]
    rows = [("machine", f"{facts['system']}, {facts['cores']} cores")]
    rows += [
        ("devices", f"{device.name}: {device.description}, {_share(device.free, device.total)}")
        for device in found.devices
    ]
    rows.append(("versions", f"minigpt4 {facts['version']}, Python {facts['python']}, {', '.join(named)}"))
    if found.libraries:
        rows.append(("versions", f"{len(right)} of {len(found.libraries)} libraries are in their promised ranges"))
    state = found.cache.problem or f"can be written, {found.cache.free / GIGABYTE:.1f} GB free"
    rows.append(("cache", f"{found.cache.folder}: {state}"))
    print_rows([*rows, *_needs(found), *_weights(found), *(("note", note) for note in found.notes)])
    # The first problem is the command's error.
    print_rows([("also", f"{problem.message}; {problem.hint}") for problem in found.problems[1:]])
    if not found.problems:
        print(f"{found.model.name if found.model else 'the model'} will run here")


def _needs(found: "CheckUp") -> list[tuple[str, str]]:
    """Say what the model needs, part by part."""
    if found.model is None or found.placement is None or found.need is None:
        return []
    wanted = found.placement
    packed = "" if wanted.quantize == "none" else f", its language model in {wanted.quantize}"
    rows = [
        ("model", f"{found.model.name} on {wanted.device} in {wanted.dtype}{packed}"),
        ("model", f"{counted(wanted.num_beams, 'beam')}, {wanted.context} tokens of conversation and answer"),
    ]
    rows += [("memory", f"{size / GIGABYTE:7.2f} GB  {what}") for what, size in found.need.on_device.items()]
    free = found.free[wanted.device]
    rows.append(("memory", f"{found.need.total / GIGABYTE:7.2f} GB  together; {free / GIGABYTE:.2f} GB are free"))
    if found.need.loading:
        free = found.free["cpu"]
        text = f"of the computer's own while loading; {free / GIGABYTE:.2f} GB are free"
        rows.append(("memory", f"{found.need.loading / GIGABYTE:7.2f} GB  {text}"))
    return rows


def _weights(found: "CheckUp") -> list[tuple[str, str]]:
    """Say what a look at the language model's numbers gave."""
    seen = found.sanity
    if seen is None or seen.problem:
        return []
    text = f"sound: the loss on a plain sentence is {seen.loss:.2f}, guessing costs {seen.chance:.2f}"
    return [("weights", text), *(("weights", note) for note in seen.notes)]


def _share(free: int, total: int) -> str:
    return f"{free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free"
