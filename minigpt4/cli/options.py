"""The application, and the options that several commands take, with what is refused of them before a model loads."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt4 import __version__
from minigpt4.cli.console import note, quiet
from minigpt4.cli.progress import parts_bar
from minigpt4.errors import ImageError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


def examples(*commands: str) -> str:
    """Write a command's examples as its help's last lines."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)  # \b keeps the line breaks


app = typer.Typer(
    name="minigpt4",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=examples('minigpt4 ask cat.jpg "What is in this picture?"', "minigpt4 chat cat.jpg"),
)

weights_app = typer.Typer(name="weights", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(weights_app)
data_app = typer.Typer(name="data", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")]


DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "nf4")

Model = Annotated[str, typer.Option("--model", "-m", help="nano, a model or alignment folder, or owner/name of a hub.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Quantize = Annotated[str, typer.Option(help="none, int8 or nf4: the language model in fewer bits.")]
LanguageModel = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Another copy of nano's language model, such as one from a hub.")
]


CfgPath = Annotated[
    Path | None, typer.Option(metavar="FILE.yaml", help="One of the original's YAML files in place of a model.")
]
Options = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Change a key of that YAML, such as model.ckpt=FILE.")
]
GpuId = Annotated[int | None, typer.Option(min=0, metavar="N", help="As --device cuda:N.")]


MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
NumBeams = Annotated[int, typer.Option(min=1, help="Answers followed at once; above 1 the text comes whole.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest answer; above: drawn.")]
TopP = Annotated[
    float | None, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this total; with --temperature.")
]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 makes repetition less likely.")]
LengthPenalty = Annotated[float | None, typer.Option(help="Above 0 favours longer answers; with --num-beams.")]
MinLength = Annotated[int | None, typer.Option(min=0, help="Shortest answer, in tokens.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes drawn answers repeatable; with --temperature.")]


_KEY_VALUE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=.*", re.DOTALL)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also after the command.")] = False,
    version: Version = False,
) -> None:
    """Ask questions about pictures."""


@weights_app.callback()
def _weights() -> None:
    """Prepare, check, import and export weights."""


@data_app.callback()
def _data() -> None:
    """Check and index examples to train on."""


_NAMES = ("max_new_tokens", "num_beams", "temperature", "top_p", "repetition_penalty", "length_penalty", "min_length")


def checked_generation(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take a command's generation options out of its arguments.

    Raises:
        UsageError: One is out of its range, or changes nothing without another that was not given.
    """
    from minigpt4.inference.sampling import generation_options

    options = {name: arguments[name] for name in (*_NAMES, "seed")}
    generation_options(options, as_typed)
    if not options["temperature"]:
        for name in ("top_p", "seed"):
            if options[name] is not None:
                raise UsageError(
                    f"{as_typed(name)} changes nothing in the likeliest answer, only in one that is drawn",
                    f"give --temperature too, for example 0.7, or leave {as_typed(name)} out",
                )
    if options["num_beams"] == 1 and options["length_penalty"] is not None:
        raise UsageError(
            "--length-penalty changes nothing unless several answers are followed at once",
            "give --num-beams too, for example 5, or leave --length-penalty out",
        )
    return options


def check_context(model: str, max_new_tokens: int) -> None:
    """Refuse an answer that is as long as all that the language model reads; its configuration tells.

    Raises:
        UsageError: There would be no room for a question.
    """
    from minigpt4.weights.checking.models import context_of

    context = context_of(model)
    if context is not None and max_new_tokens >= context:
        raise UsageError(
            f"an answer may have {max_new_tokens} tokens, and the language model reads {context}, question and answer "
            "together",
            "give a lower --max-new-tokens",
        )


def as_typed(name: str) -> str:
    """Write an option's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def check_placement(device: str, dtype: str, quantize: str) -> None:
    """Refuse names that no machine knows, before torch, which knows this machine, has to load."""
    if not DEVICE.fullmatch(device):
        raise UsageError(f"there is no device {device!r}", "expected auto, cpu, cuda, cuda:N or mps")
    if dtype not in DTYPES:
        raise UsageError(f"there is no number type {dtype!r}", f"expected one of {', '.join(DTYPES)}")
    if quantize not in QUANTIZATIONS:
        raise UsageError(f"there is no quantization {quantize!r}", f"expected one of {', '.join(QUANTIZATIONS)}")


def quiet_for(model: str) -> None:
    """Keep the libraries quiet, and off the network unless the model comes from the hub."""
    from minigpt4.weights.hub import is_on_hub

    quiet(hub=is_on_hub(model))


QUESTION_HINT = 'for example: minigpt4 ask cat.jpg "What is in this picture?"'


def open_all(pictures: list[str], *, stdin_taken: bool = False) -> "list[Image]":
    """Open pictures by path, `-` for standard input; `stdin_taken` where questions come from there."""
    from minigpt4.processing.pictures import open_image

    if pictures.count("-") > (not stdin_taken):
        what = "questions from it" if stdin_taken else "one picture from it"
        raise UsageError(f"standard input was named for {pictures.count('-')} pictures", f"this command reads {what}")
    opened = []
    for number, picture in enumerate(pictures):
        try:
            opened.append(open_image(picture))
        except ImageError as error:
            if number and isinstance(error.__cause__, FileNotFoundError):
                raise ImageError(error.message, f"put the question in quotes; {QUESTION_HINT}") from error
            raise
    return opened


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
        if gpu_id is None:  # an impossible device is refused before an import of many gigabytes
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
