"""`minigpt4 weights`: deltas, Meta's files, the original's files both ways, and what a file is."""

import json
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4.cli.console import note, quiet
from minigpt4.cli.doctor import print_rows
from minigpt4.cli.options import AsJson, CfgPath, Options, examples, weights_app
from minigpt4.cli.progress import parts_bar
from minigpt4.errors import StorageError, UsageError
from minigpt4.text import counted

if TYPE_CHECKING:
    from minigpt4.weights.checking.inspection_kinds import Inspection
    from minigpt4.weights.original.importing import Imported


class FileFormat(StrEnum):
    """How weights are written."""

    SAFETENSORS = "safetensors"
    BIN = "bin"


class Precision(StrEnum):
    """Types of weights."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


Base = Annotated[
    Path,
    typer.Option(
        "--base", "--base-model-path", "--base-model", metavar="DIR", help="The LLaMA, in transformers' format."
    ),
]
Target = Annotated[
    Path, typer.Option("--target", "--target-model-path", "--target-model", metavar="DIR", help="The folder to write.")
]
Format = Annotated[FileFormat, typer.Option("--format", help="`bin` for tools that read pytorch_model-N.bin.")]
Rounding = Annotated[Precision | None, typer.Option("--dtype", help="Round both sides to this type first.")]


@weights_app.command(
    name="apply-delta",
    epilog=examples(
        "minigpt4 weights apply-delta --base llama-7b --delta vicuna-7b-delta-v0 --target vicuna-7b-v0",
        "minigpt4 weights apply-delta --base llama-7b --delta vicuna-7b-delta-v1.1 --target vicuna-7b --format bin",
    ),
)
def apply_delta(
    base: Base,
    delta: Annotated[Path, typer.Option("--delta", "--delta-path", metavar="DIR", help="The delta, v0 or v1.1.")],
    target: Target,
    file_format: Format = FileFormat.SAFETENSORS,
    dtype: Rounding = None,
    trust_files: Annotated[
        bool, typer.Option("--trust-files", help="Do not tell deltas and merged models by their numbers.")
    ] = False,
    low_cpu_mem: Annotated[bool, typer.Option("--low-cpu-mem", help="Always so; accepted from older commands.")] = True,
) -> None:
    """Add a delta to its base; memory does not grow with the model, and an interrupted run goes on."""
    quiet()
    from minigpt4.weights.llama import delta as deltas

    with parts_bar() as report:
        result = deltas.apply_delta(
            base,
            delta,
            target,
            file_format=file_format.value,
            dtype=dtype.value if dtype else None,
            trust=trust_files,
            report=report,
        )
    _note_all(result.notes)
    print(result.folder)


@weights_app.command(
    name="make-delta",
    epilog=examples("minigpt4 weights make-delta --base llama-7b --model my-vicuna --target my-vicuna-delta"),
)
def make_delta(
    base: Base,
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="The model that was trained from the base.")],
    target: Target,
    file_format: Format = FileFormat.SAFETENSORS,
    dtype: Rounding = None,
) -> None:
    """Make the delta that turns a base into a model, to publish it: the inverse of apply-delta."""
    quiet()
    from minigpt4.weights.llama import delta as deltas

    with parts_bar() as report:
        result = deltas.make_delta(
            base, model, target, file_format=file_format.value, dtype=dtype.value if dtype else None, report=report
        )
    _note_all(result.notes)
    print(result.folder)


@weights_app.command(
    name="from-meta",
    epilog=examples("minigpt4 weights from-meta --input LLaMA/7B --output llama-7b"),
)
def from_meta(
    source: Annotated[
        Path, typer.Option("--input", "--input-dir", metavar="DIR", help="Holds consolidated.*.pth and params.json.")
    ],
    output: Annotated[Path, typer.Option("--output", "--output-dir", metavar="DIR", help="The folder to write.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="FILE", help="tokenizer.model; else looked for beside the weights."),
    ] = None,
    file_format: Format = FileFormat.SAFETENSORS,
) -> None:
    """Convert Meta's own LLaMA files to a folder in transformers' format."""
    quiet()
    from minigpt4.weights.llama import meta

    with parts_bar() as report:
        notes = meta.from_meta(source, output, tokenizer=tokenizer, file_format=file_format.value, report=report)
    _note_all(notes)
    print(output)


@weights_app.command(epilog=examples("minigpt4 weights verify vicuna-7b-v0"))
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    quick: Annotated[bool, typer.Option("--quick", help="Compare names and sizes only.")] = False,
) -> None:
    """Check that a folder written here holds what its manifest says, byte for byte."""
    from minigpt4.text import size_text
    from minigpt4.weights.files.atomic import verify_folder

    manifest = verify_folder(folder, deep=not quick)
    size = sum(entry.size for entry in manifest.files.values())
    print(f"{folder}: {len(manifest.files)} files, {size_text(size)}, as written")


def _note_all(notes: list[str]) -> None:
    for text in notes:
        note(text)


Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to appear.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that this command wrote before.")]


@weights_app.command(
    "import",
    epilog=examples(
        "minigpt4 weights import -o models/minigpt4-7b --cfg-path eval_configs/minigpt4_eval.yaml",
        "minigpt4 weights import -o models/minigpt4-7b --vision eva_vit_g.pth --language-model vicuna-7b "
        "--qformer blip2_pretrained_flant5xxl.pth --projection prerained_minigpt4_7b.pth",
    ),
)
def import_weights(
    output: Output,
    cfg_path: CfgPath = None,
    options: Options = None,
    vision: Annotated[Path | None, typer.Option(help="eva_vit_g.pth, or a BLIP-2 folder of a hub.")] = None,
    qformer: Annotated[Path | None, typer.Option(help="blip2_pretrained_flant5xxl.pth.")] = None,
    language_model: Annotated[Path | None, typer.Option(metavar="DIR", help="A Vicuna or LLaMA folder.")] = None,
    projection: Annotated[Path | None, typer.Option(help="pretrained_minigpt4*.pth; without, it is new.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="What shapes cannot tell: vision_config.num_attention_heads=2"),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Prompt template; else the one that the checkpoint needs.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Make a model folder of the original's files."""
    if not dry_run:
        _refuse_existing(output, overwrite=overwrite)
    quiet()
    from minigpt4.weights.original.importing import import_original
    from minigpt4.weights.original.names import OriginalFiles

    given = {"vision": vision, "qformer": qformer, "language_model": language_model, "projection": projection}
    overrides = list(settings or [])
    if cfg_path is not None:
        from minigpt4.weights.original.prepare import find_files
        from minigpt4.weights.original.yaml import read_original_yaml

        read = read_original_yaml(cfg_path, options or [])
        files = find_files(read, given, training=read.is_for_training)
        overrides = [*read.overrides, *overrides]
        template = template or read.family.template
        for sentence in read.notes:
            note(sentence)
    elif options:
        raise UsageError("--options changes keys of a YAML, and there is none", "add --cfg-path, or use --set")
    elif vision is None or language_model is None:
        lacking = "--vision" if vision is None else "--language-model"
        raise UsageError(f"weights import needs {lacking}", "or --cfg-path with one of the original's YAML files")
    else:
        files = OriginalFiles(vision, language_model, qformer, projection)
    with parts_bar() as report:
        done = import_original(
            output, files, overrides=overrides, template=template, overwrite=overwrite, dry_run=dry_run, report=report
        )
    _note_import(done)
    print("nothing was written: --dry-run" if dry_run else done.folder)


def _refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is there, before anything is read; one that may be replaced with `--overwrite`."""
    from minigpt4.weights.files.atomic import MANIFEST_NAME, refuse_existing

    try:
        refuse_existing(output, overwrite=overwrite)
    except StorageError as error:
        if overwrite or not (output / MANIFEST_NAME).is_file():
            raise
        raise StorageError(error.message, "--overwrite replaces it; or choose another place") from error


def _note_import(done: "Imported") -> None:
    """Say what was used, what was not, and what was mended."""
    for path, count in done.plan.used.items():
        note(f"{path}: {counted(count, 'tensor')} used")
    reasons = Counter((path, reason) for path, _, reason in done.plan.ignored)
    for (path, reason), count in reasons.items():
        note(f"{path}: {counted(count, 'tensor')} not needed: {reason}")
    for sentence in done.notes:
        note(sentence)
    note(f"{done.plan.num_parameters:,} parameters, prompt template {done.template}")


@weights_app.command(
    "export",
    epilog=examples(
        "minigpt4 weights export models/minigpt4-7b -o exported",
        "minigpt4 weights export runs/mine -o exported --only-checkpoint",
    ),
)
def export_weights(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A full model folder, or an alignment over one.")],
    output: Output,
    only_checkpoint: Annotated[
        bool, typer.Option("--only-checkpoint", help="Only what was trained, as pretrained_minigpt4.pth.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a model folder as the original's files."""
    _refuse_existing(output, overwrite=overwrite)
    quiet()
    from minigpt4.weights.original.exporting import export_original

    with parts_bar() as report:
        notes = export_original(model, output, only_checkpoint=only_checkpoint, overwrite=overwrite, report=report)
    _note_all(notes)
    print(output)


@weights_app.command(
    epilog=examples("minigpt4 weights inspect pretrained_minigpt4.pth", "minigpt4 weights inspect vicuna-7b --json")
)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file of weights, or a folder with some.")],
    as_json: AsJson = False,
) -> None:
    """Tell what a file or folder of weights is, what it fits and what is missing."""
    quiet()
    from minigpt4.weights.checking.inspection import inspect as look_at

    found = look_at(path)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print_inspection(found)


def _print_inspection(found: "Inspection") -> None:
    from minigpt4.text import size_text

    print(f"{found.path}: {found.title}")
    size = f"{size_text(found.bytes)} on disk"
    if found.parameters is not None:
        size += f", {found.parameters:,} parameters"
    types = ", ".join(t if len(found.dtypes) == 1 else f"{n:,} in {t}" for t, n in found.dtypes.items())
    rows = [
        ("version", found.version),
        ("sizes", ", ".join(f"{name} {value}" for name, value in found.sizes.items())),
        ("contents", ", ".join(part for part in (size, types) if part)),
        ("template", found.template or ""),
        *(("fits", text) for text in found.fits),
        *(("missing", text) for text in found.missing),
        *(("note", text) for text in found.notes),
    ]
    print_rows(rows)
