"""The command line: each command parses, calls one function and prints.

Answers and data go to standard output, everything else to standard error. Heavy libraries load inside the command that
needs them. A mistake of the user's is one sentence and a hint, exit status 2; `--debug` shows the traceback.
"""

import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt4 import __version__
from minigpt4.errors import ImageError, MiniGPT4Error, StorageError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from minigpt4.chat import ChatSession

QUESTION_HINT = 'for example: minigpt4 ask cat.jpg "What is in this picture?"'
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "nf4")


def _examples(*commands: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)  # \b keeps the line breaks


app = typer.Typer(
    name="minigpt4",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=_examples('minigpt4 ask cat.jpg "What is in this picture?"', "minigpt4 chat cat.jpg"),
)

Model = Annotated[str, typer.Option("--model", "-m", help="nano, or a model or alignment folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Quantize = Annotated[str, typer.Option(help="none, int8 or nf4: the language model in fewer bits.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
NumBeams = Annotated[int, typer.Option(min=1, help="Answers followed at once; above 1 the text comes whole.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest answer; above: drawn.")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this total.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 makes repetition less likely.")]
LengthPenalty = Annotated[float | None, typer.Option(help="With beams: above 0 favours longer answers.")]
MinLength = Annotated[int | None, typer.Option(min=0, help="Shortest answer, in tokens.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes drawn answers repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also after the command.")] = False,
    version: Version = False,
) -> None:
    """Ask questions about pictures."""


@app.command(
    epilog=_examples(
        'minigpt4 ask cat.jpg "What is in this picture?"',
        'curl -s https://example.org/cat.jpg | minigpt4 ask - "What animal is this?" --json',
    )
)
def ask(
    pictures: Annotated[list[str] | None, typer.Argument(metavar="PICTURE", help="Files; - is stdin.")] = None,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="In quotes.")] = "",
    model: Model = "nano",
    max_new_tokens: MaxNewTokens = 300,
    num_beams: NumBeams = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    length_penalty: LengthPenalty = None,
    min_length: MinLength = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    as_json: AsJson = False,
) -> None:
    """Answer one question about pictures."""
    options = _generation(locals())
    if not pictures:
        raise UsageError("ask needs a picture and a question", QUESTION_HINT)
    _check_question(question)
    if os.path.isfile(question):
        raise UsageError(f"the last argument, {question!r}, is a file, expected a question", QUESTION_HINT)
    _check_placement(device, dtype, quantize)
    opened = _open_all(pictures)  # before the model: a wrong picture is told at once
    started = time.monotonic()
    chat = _session(model, options, device=device, dtype=dtype, quantize=quantize)
    loaded = time.monotonic() - started
    for picture in opened:
        chat.add_image(picture)
    _stream(chat, question, options, show=not as_json)
    if as_json:
        print(json.dumps(_as_json(chat, model, loaded), ensure_ascii=False))
    if chat.answer.finish_reason == "cancelled":
        raise KeyboardInterrupt


@app.command(
    epilog=_examples(
        "minigpt4 chat cat.jpg",
        "printf 'What is this?\\nWhat colour is it?\\n' | minigpt4 chat cat.jpg",
    )
)
def chat(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="PICTURE", help="Belong to the first question.")
    ] = None,
    model: Model = "nano",
    max_new_tokens: MaxNewTokens = 300,
    num_beams: NumBeams = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    length_penalty: LengthPenalty = None,
    min_length: MinLength = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
) -> None:
    """Hold a conversation; /help in it says more."""
    options = _generation(locals())
    if sys.stdin is None:
        raise UsageError("standard input is closed, and chat reads questions from it", "ask answers one question")
    _check_placement(device, dtype, quantize)
    opened = _open_all(pictures or [], stdin_taken=True)
    session = _session(model, options, device=device, dtype=dtype, quantize=quantize)
    for picture in opened:
        session.add_image(picture)
    _note(f"{model} is ready; /help lists the commands")
    for line in _lines():
        try:
            if line.startswith("/"):
                if _command(session, line) is False:
                    return
            elif line.strip():
                _check_question(line)
                _stream(session, line, options)
        except MiniGPT4Error as error:
            _complain(error)


@app.command(epilog=_examples("minigpt4 models", "minigpt4 models --json"))
def models(as_json: AsJson = False) -> None:
    """List the models, their parts and needs."""
    from minigpt4.weights.inventory import list_models

    rows = list_models()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']}: {row['description']}")
        for part in row["parts"]:
            licence = part["licence"] or "licence not stated"
            print(f"  {part['role']}: {part['name']}, {licence}, {part['megabytes']} MB, {part['state']}")
        print(f"  memory: about {row['memory_gigabytes']} GB; kept in {row['folder']}")


@app.command(
    epilog=_examples(
        "minigpt4 train recipes/nano.yaml",
        "minigpt4 train recipes/nano.yaml --set output=runs/mine --set stages.0.steps=100",
    )
)
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
) -> None:
    """Train, or go on with what was interrupted."""
    from minigpt4.training.recipe import read_recipe

    settings = read_recipe(recipe, overrides)
    from minigpt4.training.run import run

    _quiet()
    with _training_bar() as report, _parts_bar() as report_parts:
        folder = run(settings, report, report_parts)
    print(folder)


def main() -> None:
    """Run the command line, and turn what goes wrong into one sentence and an exit status."""
    arguments, debug = _without_debug(sys.argv[1:])
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    _forgiving_streams()
    try:
        _run(arguments)
    except MiniGPT4Error as error:
        if debug:
            raise
        _complain(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has enough
        sys.exit(141)
    except Exception as error:
        if debug:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _complain(MiniGPT4Error(f"unexpected {reason}", hint="--debug shows where"))
        sys.exit(1)


def _run(arguments: list[str]) -> None:
    """Run a command without the library's own handling of errors, which would write its own words and statuses."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("minigpt4", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit:
        return
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        where = getattr(error, "ctx", None)
        path = where.command_path if where else "minigpt4"
        if not arguments:
            print(error.format_message(), file=sys.stderr)  # the help
            sys.exit(2)
        message = " ".join(error.format_message().split()).rstrip(".")
        raise UsageError(message[:1].lower() + message[1:], f"`{path} --help` says what there is") from error
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a broken pipe is still handled


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of the arguments, wherever it stands before `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return options + arguments[end:], len(options) < end


def _forgiving_streams() -> None:
    """Let no character that a terminal lacks, and no byte that is not UTF-8, end the program."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def _check_question(question: str) -> None:
    from minigpt4.processing.messages import MAX_MESSAGE_CHARACTERS

    if not question.strip():
        raise UsageError("the question is empty", QUESTION_HINT)
    if len(question) > MAX_MESSAGE_CHARACTERS:
        raise UsageError(
            f"the question has {len(question)} characters, expected at most {MAX_MESSAGE_CHARACTERS}", "shorten it"
        )
    if any("\ud800" <= character <= "\udfff" for character in question):
        raise UsageError("the question is not valid UTF-8", "type it anew, or set the terminal to UTF-8")


def _check_placement(device: str, dtype: str, quantize: str) -> None:
    """Refuse names that no machine knows, before torch, which knows this machine, has to load."""
    if not DEVICE.fullmatch(device):
        raise UsageError(f"there is no device {device!r}", "expected auto, cpu, cuda, cuda:N or mps")
    if dtype not in DTYPES:
        raise UsageError(f"there is no number type {dtype!r}", f"expected one of {', '.join(DTYPES)}")
    if quantize not in QUANTIZATIONS:
        raise UsageError(f"there is no quantization {quantize!r}", f"expected one of {', '.join(QUANTIZATIONS)}")


def _generation(arguments: dict[str, Any]) -> dict[str, Any]:
    names = ("max_new_tokens", "num_beams", "temperature", "top_p", "repetition_penalty", "length_penalty")
    return {name: arguments[name] for name in (*names, "min_length", "seed")}


def _open_all(pictures: list[str], *, stdin_taken: bool = False) -> "list[Image]":
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


def _session(model: str, options: dict[str, Any], **placement: Any) -> "ChatSession":
    _quiet()
    from minigpt4.chat import ChatSession, generation_options
    from minigpt4.weights import load

    with _parts_bar() as report:
        generation_options(options)  # a wrong option is told before the model loads
        return ChatSession(*load(model, report=report, **placement))


def _stream(chat: "ChatSession", question: str, options: dict[str, Any], show: bool = True) -> None:
    """Print an answer as it comes; Ctrl-C ends the answer and keeps what was said."""
    before = signal.signal(signal.SIGINT, lambda *_: chat.cancel())
    try:
        for piece in chat.stream(question, **options):
            if show:
                print(piece, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    if show:
        print(flush=True)
    if chat.answer.finish_reason == "cancelled":
        _note("stopped")
    elif chat.answer.finish_reason == "length":
        _note(f"the answer reached {options['max_new_tokens']} tokens and was cut; --max-new-tokens raises it")


def _as_json(chat: "ChatSession", model: str, loaded: float) -> dict[str, Any]:
    answer = chat.answer
    return {
        "answer": answer.text,
        "model": model,
        "finish_reason": answer.finish_reason,
        "tokens": {
            "prompt": answer.prompt_tokens,
            "cached": answer.cached_tokens,
            "completion": answer.completion_tokens,
        },
        "seconds": {
            "load": round(loaded, 3),
            "first_token": round(answer.seconds_to_first_token, 3),
            "total": round(answer.seconds, 3),
        },
    }


HELP = """/image PATH  add a picture to the next question
/undo        take back the last question and its answer
/reset       begin anew
/save FILE   write the conversation as JSON (.json) or Markdown
/help        this list
/quit        leave; so does Ctrl-D
Ctrl-C       stop an answer"""


def _command(session: "ChatSession", line: str) -> bool:
    """Carry out a line that begins with a slash; False ends the conversation."""
    name, _, argument = line[1:].strip().partition(" ")
    argument = argument.strip()
    match name:
        case "image" if argument:
            session.add_image(_open_all([os.path.expanduser(argument)], stdin_taken=True)[0])
            _note(f"{argument} belongs to the next question")
        case "undo":
            session.undo()
            _note("the last question is taken back")
        case "reset":
            session.reset()
            _note("a new conversation")
        case "save" if argument:
            _save(session, Path(argument).expanduser())
            _note(f"saved as {argument}")
        case "quit" | "exit":
            return False
        case "help":
            _note(HELP)
        case "image" | "save":
            raise UsageError(f"/{name} needs a file", hint=f"for example: /{name} FILE")
        case _:
            raise UsageError(f"there is no command /{name}", hint="/help lists the commands")
    return True


def _save(session: "ChatSession", path: Path) -> None:
    from minigpt4.weights.atomic import write_file

    rows = []
    for message in session.messages:
        text = "".join(part["text"] for part in message["content"] if part["type"] == "text")
        pictures = sum(part["type"] == "image" for part in message["content"])
        rows.append({"role": message["role"], "pictures": pictures, "text": text})
    with write_file(path, "w") as file:
        if path.suffix == ".json":
            json.dump(rows, file, indent=2, ensure_ascii=False)
        else:
            for row in rows:
                file.write(f"**{row['role']}**{' [picture]' * row['pictures']}: {row['text']}\n\n")


def _lines() -> Iterator[str]:
    """Yield what is typed, with line editing and history where a person types, until the end of the input."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    on_screen = sys.stdout is not None and sys.stdout.isatty()
    with _history():
        while True:
            try:
                if not on_screen:
                    print("> ", end="", file=sys.stderr, flush=True)
                yield input("> " if on_screen else "")
            except KeyboardInterrupt:
                _note("\nCtrl-D leaves")
            except EOFError:
                _note("")
                return


@contextmanager
def _history() -> Iterator[None]:
    """Keep what is typed for the next time."""
    try:
        import readline
    except ImportError:  # Windows has line editing of its own
        yield
        return
    from minigpt4.weights.atomic import make_folder
    from minigpt4.weights.parts import home

    path = home() / "chat_history"
    try:
        if path.is_file():
            readline.read_history_file(path)
        yield
    finally:
        try:
            make_folder(path.parent)
            readline.set_history_length(1000)
            readline.write_history_file(path)
        except (OSError, StorageError) as error:
            _note(f"what was typed is not kept for the next time: {error}")


@contextmanager
def _parts_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show fetching and converting on standard error: a bar on a terminal, else a line for each thing done."""
    tasks: dict[str, Any] = {}
    with ExitStack() as stack:

        def report(what: str, done: int, total: int) -> None:
            if not sys.stderr.isatty():
                if tasks.setdefault(what, done) is done:
                    _note(what)
                return
            if not tasks:
                tasks[""] = stack.enter_context(_bar("download", transient=True))
            bar = tasks[""]
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield report


@contextmanager
def _training_bar() -> Iterator[Callable[[Any], None]]:
    """Show the stages' progress, rate and loss on standard error: bars on a terminal, else a line every 100 steps."""
    tasks: dict[str, Any] = {}
    with ExitStack() as stack:

        def report(progress: Any) -> None:  # noqa: ANN401  (training.loop.Progress, which loads torch)
            figures = f"loss {progress.loss:.3f}  hits {progress.accuracy:.0%}  {progress.seconds:.1f} s a step"
            if not sys.stderr.isatty():
                if progress.step % 100 == 0 or progress.step == progress.steps:
                    _note(f"{progress.stage}  {progress.step} of {progress.steps}  {figures}")
                return
            if not tasks:
                tasks[""] = stack.enter_context(_bar("steps", transient=False))
            bar = tasks[""]
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, total=progress.steps, figures=figures)
            bar.update(tasks[progress.stage], completed=progress.step, figures=figures)

        yield report


def _bar(kind: str, *, transient: bool) -> Any:  # noqa: ANN401  (rich.progress.Progress, which loads here)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = [DownloadColumn()] if kind == "download" else [MofNCompleteColumn(), TextColumn("{task.fields[figures]}")]
    columns = [TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn()]
    return Progress(*columns, console=Console(stderr=True), transient=transient)


def _quiet() -> None:
    """Keep the libraries' bars and notices out of the terminal, errors aside; to be called before they load."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(error: MiniGPT4Error) -> None:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
