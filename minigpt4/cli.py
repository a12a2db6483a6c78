"""The command line: each command parses, calls one function and prints.

Answers and data go to standard output, everything else to standard error. Heavy libraries load inside the command that
needs them. A mistake of the user's is one sentence and a hint, exit status 2; `--debug` shows the traceback.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt4 import __version__
from minigpt4.errors import MiniGPT4Error, UsageError

if TYPE_CHECKING:
    from minigpt4.chat import ChatSession

app = typer.Typer(
    name="minigpt4",
    help="Ask questions about pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Option("--model", "-m", help="nano, or a model or alignment folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
NumBeams = Annotated[int, typer.Option(help="Answers followed at once; above 1 the text comes in one piece.")]
Temperature = Annotated[float, typer.Option(help="0 for the likeliest answer; above, the answer is drawn.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this total probability.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 makes repetition less likely.")]
LengthPenalty = Annotated[float | None, typer.Option(help="With beams: above 0 favours longer answers.")]
MinLength = Annotated[int | None, typer.Option(help="Shortest answer, in tokens.")]
Seed = Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print answer, tokens, times and model as JSON.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def ask(
    words: Annotated[list[str], typer.Argument(metavar="PICTURE... QUESTION", help="- reads a picture from stdin.")],
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
    as_json: AsJson = False,
) -> None:
    """Answer one question about one or more pictures.

    Examples:
      minigpt4 ask cat.jpg "What is in this picture?"
      curl -s https://example.org/cat.jpg | minigpt4 ask - "What animal is this?" --json
    """
    options = _generation(locals())
    *pictures, question = words
    if not pictures:
        raise UsageError(
            "ask needs a picture and a question", hint='for example: minigpt4 ask cat.jpg "What is in this picture?"'
        )
    if not question.strip():
        raise UsageError("the question is empty", hint='for example: minigpt4 ask cat.jpg "What is in this picture?"')
    opened = [_open(picture) for picture in pictures]  # before the model: a wrong picture is told at once
    started = time.monotonic()
    chat = _session(model, device, dtype, options)
    loaded = time.monotonic() - started
    for picture in opened:
        chat.add_image(picture)
    _stream(chat, question, options, show=not as_json)
    if as_json:
        print(json.dumps(_as_json(chat, model, loaded), ensure_ascii=False))


@app.command()
def chat(
    pictures: Annotated[list[str] | None, typer.Argument(metavar="[PICTURE...]")] = None,
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
) -> None:
    """Hold a conversation; /help lists what can be typed besides questions.

    Examples:
      minigpt4 chat cat.jpg
      printf 'What is this?\\nWhat colour is it?\\n' | minigpt4 chat cat.jpg
    """
    options = _generation(locals())
    opened = [_open(picture) for picture in pictures or []]
    session = _session(model, device, dtype, options)
    for picture in opened:
        session.add_image(picture)
    _note(f"{model} is ready; /help lists the commands")
    for line in _lines():
        try:
            if line.startswith("/"):
                if _command(session, line) is False:
                    return
            elif line.strip():
                _stream(session, line, options)
        except MiniGPT4Error as error:
            _complain(error)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models that are here, what each needs, and what is missing.

    Examples:
      minigpt4 models
      minigpt4 models --json
    """
    from minigpt4.weights.inventory import list_models

    rows = list_models()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['name']}: {row['description']}")
        for part in row["parts"]:
            print(f"  {part['role']}: {part['name']}, {part['licence']}, {part['megabytes']} MB, {part['state']}")
        print(f"  memory: about {row['memory_gigabytes']} GB; kept in {row['folder']}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
) -> None:
    """Train an alignment, or go on with one that was interrupted.

    Examples:
      minigpt4 train recipes/nano.yaml
      minigpt4 train recipes/nano.yaml --set output=runs/mine --set stages.0.steps=100
    """
    from minigpt4.training.recipe import read_recipe

    settings = read_recipe(recipe, overrides)
    from minigpt4.training.run import run

    _quiet()
    with _training_bar() as report, _parts_bar() as report_parts:
        folder = run(settings, report, report_parts)
    print(folder)


def main() -> None:
    """Run the command line, and turn what goes wrong into one sentence and an exit status."""
    debug = "--debug" in sys.argv
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except MiniGPT4Error as error:
        if debug:
            raise
        _complain(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has enough
        sys.exit(141)
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("click", "typer") and hasattr(error, "format_message"):
            _complain(UsageError(error.format_message().rstrip("."), hint="minigpt4 --help lists the commands"))
            sys.exit(2)
        if debug:
            raise
        _complain(MiniGPT4Error(f"unexpected {type(error).__name__}: {error}", hint="--debug shows where"))
        sys.exit(1)


def _generation(arguments: dict[str, Any]) -> dict[str, Any]:
    names = ("max_new_tokens", "num_beams", "temperature", "top_p", "repetition_penalty", "length_penalty")
    return {name: arguments[name] for name in (*names, "min_length", "seed")}


def _open(picture: str) -> Any:  # noqa: ANN401  (a Pillow image; Pillow loads inside)
    from minigpt4.processing.pictures import open_image

    return open_image(picture)


def _session(model: str, device: str, dtype: str, options: dict[str, Any]) -> "ChatSession":
    _quiet()
    with _parts_bar() as report:
        from minigpt4.chat import ChatSession, generation_options
        from minigpt4.weights import load

        generation_options(options)  # a wrong option is told before the model loads
        return ChatSession(*load(model, device=device, dtype=dtype, report=report))


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
            session.add_image(argument)
            _note(f"{argument} belongs to the next question")
        case "undo":
            session.undo()
            _note("the last question is taken back")
        case "reset":
            session.reset()
            _note("a new conversation")
        case "save" if argument:
            _save(session, Path(argument))
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
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline

    from minigpt4.weights.parts import home

    history = home() / "chat_history"
    if history.is_file():
        readline.read_history_file(history)
    try:
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                _note("Ctrl-D leaves")
    except EOFError:
        _note("")
    finally:
        history.parent.mkdir(parents=True, exist_ok=True)
        readline.set_history_length(1000)
        readline.write_history_file(history)


@contextmanager
def _parts_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show fetching and converting on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield report


@contextmanager
def _training_bar() -> Iterator[Callable[[Any], None]]:
    """Show the stages' progress, rate, time left and loss on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def report(progress: Any) -> None:  # noqa: ANN401  (training.loop.Progress, which loads torch)
            figures = f"loss {progress.loss:.3f}  hits {progress.accuracy:.0%}  {progress.seconds:.1f} s a step"
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, total=progress.steps, figures=figures)
            bar.update(tasks[progress.stage], completed=progress.step, figures=figures)

        yield report


def _quiet() -> None:
    """Keep the libraries' own bars and notices out of the terminal; errors still come."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(error: MiniGPT4Error) -> None:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
