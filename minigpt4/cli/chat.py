"""`minigpt4 chat`: a conversation line by line, with a history, and the commands that begin with a slash."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt4.cli.ask import check_question, load_session, loading_options, stream
from minigpt4.cli.console import complain, note
from minigpt4.cli.interrupts import heard
from minigpt4.cli.options import (
    CfgPath,
    Device,
    Dtype,
    GpuId,
    LanguageModel,
    LengthPenalty,
    MaxNewTokens,
    MinLength,
    Model,
    NumBeams,
    Options,
    Quantize,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopP,
    app,
    check_placement,
    checked_generation,
    examples,
    open_all,
)
from minigpt4.errors import MiniGPT4Error, StorageError, UsageError

if TYPE_CHECKING:
    from minigpt4.inference.chat import ChatSession


HELP = """/image PATH  add a picture to the next question
/undo        take back the last question and its answer
/reset       begin anew
/save FILE   write the conversation as JSON (.json) or Markdown
/save! FILE  the same, in place of a file that is there
/help        this list
/quit        leave; so do Ctrl-D, and Ctrl-C twice
Ctrl-C       while an answer comes: stop it"""


@app.command(
    epilog=examples(
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
    language_model: LanguageModel = None,
    cfg_path: CfgPath = None,
    options: Options = None,
    gpu_id: GpuId = None,
) -> None:
    """Hold a conversation; /help in it says more."""
    generation = checked_generation(locals())
    if sys.stdin is None:
        raise UsageError("standard input is closed, and chat reads questions from it", "ask answers one question")
    check_placement(device, dtype, quantize)
    opened = open_all(pictures or [], stdin_taken=True)
    session = load_session(**loading_options(locals()))
    for picture in opened:
        session.add_image(picture)
    lacking = "" if opened else ", without a picture: /image PATH adds one"
    note(f"{cfg_path or model} is ready{lacking}; /help lists the commands")
    for line in lines():
        try:
            if line.startswith("/"):
                if carry_out(session, line) is False:
                    return
            elif line.strip():
                check_question(line)
                stream(session, line, generation)
        except MiniGPT4Error as error:
            complain(error)


def carry_out(session: "ChatSession", line: str) -> bool:
    """Carry out a line that begins with a slash; False ends the conversation."""
    name, _, argument = line[1:].strip().partition(" ")
    argument = argument.strip()
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "'\"":
        argument = argument[1:-1]  # a file that is dragged into a terminal comes quoted
    match name:
        case "image" if argument:
            session.add_image(open_all([os.path.expanduser(argument)], stdin_taken=True)[0])
            note(f"{argument} belongs to the next question")
        case "undo":
            pictures = _pictures(session)
            session.undo()
            gone = pictures > _pictures(session)
            note(f"the last question is taken back{', its picture too; /image adds one' if gone else ''}")
        case "reset":
            pictures = _pictures(session)
            session.reset()
            note(f"a new conversation{' without pictures; /image adds one' if pictures else ''}")
        case "save" | "save!" if argument:
            _save(session, Path(argument).expanduser(), replace=name == "save!")
            note(f"saved as {argument}")
        case "quit" | "exit":
            return False
        case "help":
            note(HELP)
        case "image" | "save" | "save!":
            raise UsageError(f"/{name} needs a file", hint=f"for example: /{name} FILE")
        case _:
            raise UsageError(f"there is no command /{name}", hint="/help lists the commands")
    return True


def _pictures(session: "ChatSession") -> int:
    return sum(part["type"] == "image" for message in session.messages for part in message["content"])


def _save(session: "ChatSession", path: Path, *, replace: bool) -> None:
    from minigpt4.weights.files.atomic import write_file

    if not replace and path.is_file():
        raise UsageError(f"{path} exists already", f"/save! {path} replaces it")
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


def lines() -> Iterator[str]:
    """Yield what is typed, with line editing and history where a person types, until the end of the input.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed twice at the prompt; one may have been for an answer that just ended.
    """
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    on_screen = sys.stdout is not None and sys.stdout.isatty()
    interrupted = False
    with _history():
        while True:
            try:
                if not on_screen and sys.stderr is not None:
                    print("> ", end="", file=sys.stderr, flush=True)
                line = input("> " if on_screen else "")
            except KeyboardInterrupt:
                heard()
                note("")  # the prompt's line is not ended yet
                if interrupted:
                    raise
                interrupted = True
                note("Ctrl-C once more leaves; so do Ctrl-D and /quit")
                continue
            except EOFError:
                note("")
                return
            interrupted = interrupted and not line.strip()
            yield line


@contextmanager
def _history() -> Iterator[None]:
    """Keep what is typed for the next time."""
    try:
        import readline
    except ImportError:  # Windows has line editing of its own
        yield
        return
    from minigpt4.weights.files.disk import make_folder
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
            note(f"what was typed is not kept for the next time: {error}")
