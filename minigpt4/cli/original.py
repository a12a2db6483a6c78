"""`minigpt4 weights import` and `export`, and the options of those who come from the original."""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4.cli.app import examples, weights_app
from minigpt4.cli.terminal import note, parts_bar, quiet
from minigpt4.errors import StorageError, UsageError
from minigpt4.text import counted

if TYPE_CHECKING:
    from minigpt4.weights.original.importing import Imported

CfgPath = Annotated[
    Path | None, typer.Option(metavar="FILE.yaml", help="One of the original's YAML files in place of a model.")
]
Options = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Change a key of that YAML, such as model.ckpt=FILE.")
]
GpuId = Annotated[int | None, typer.Option(min=0, metavar="N", help="As --device cuda:N.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to appear.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that this command wrote before.")]

_KEY_VALUE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=.*", re.DOTALL)


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
    _tell(done)
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


def _tell(done: "Imported") -> None:
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
    for sentence in notes:
        note(sentence)
    print(output)


def from_the_original(
    cfg_path: Path | None,
    options: list[str] | None,
    gpu_id: int | None,
    *,
    model: str,
    device: str,
    quantize: str,
    language_model: Path | None = None,
) -> tuple[str, str, str]:
    """Turn the original's options into this package's, importing its files on first use.

    Returns:
        Model, device and quantization for `load`; those given where the original's options say nothing.

    Raises:
        UsageError: `--options` without `--cfg-path`, or a second model or language model beside it.
    """
    if cfg_path is not None and model != "nano":
        raise UsageError("both --cfg-path and --model name a model", "give one of them")
    if cfg_path is not None and language_model is not None:
        raise UsageError(
            "both --cfg-path and --language-model name a language model",
            "give one of them; --options model.llama_model=DIR names another one in the YAML",
        )
    if cfg_path is None:
        if options:
            raise UsageError("--options changes keys of a YAML, and there is none", "add --cfg-path FILE.yaml")
        if gpu_id is None:
            return model, device, quantize
    quiet()
    from minigpt4.weights.folder import placement, quantization
    from minigpt4.weights.original.prepare import chosen_device, prepare_original

    if cfg_path is None:
        device, notes = chosen_device(gpu_id, device)
    else:
        if gpu_id is None:  # what cannot be had is told before an import of many gigabytes
            quantization(quantize, placement(device, "auto")[0])
        with parts_bar() as report:
            found = prepare_original(cfg_path, options or [], gpu_id, device=device, report=report)
        model, device, notes = str(found.folder), found.device, found.notes
        quantize = quantize if quantize != "none" else found.quantize
    for sentence in notes:
        note(sentence)
    return model, device, quantize


def spread_options(arguments: list[str]) -> list[str]:
    """Let one `--options` take several values, as in the original: each gets an `--options` of its own."""
    spread: list[str] = []
    inside = False
    for argument in arguments:
        follows = bool(spread) and spread[-1] == "--options"
        if inside and not follows and _KEY_VALUE.fullmatch(argument):
            spread.append("--options")
        inside = argument == "--options" or (bool(_KEY_VALUE.fullmatch(argument)) and (inside or follows))
        spread.append(argument)
    return spread
