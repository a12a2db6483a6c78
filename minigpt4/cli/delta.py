"""`minigpt4 weights apply-delta`, `make-delta`, `from-meta` and `verify`: language models from what was published."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from minigpt4.cli.app import examples, weights_app
from minigpt4.cli.terminal import note, parts_bar, quiet


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
    _tell(result.notes)
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
    _tell(result.notes)
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
    _tell(notes)
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


def _tell(notes: list[str]) -> None:
    for text in notes:
        note(text)
