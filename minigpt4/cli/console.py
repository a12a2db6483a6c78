"""Standard error and standard input of the command line: notices, errors, and quiet libraries."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from minigpt4.errors import MiniGPT4Error


def note(text: str) -> None:
    """Tell the person something that is no answer.

    Text and line break are one write: with `PYTHONUNBUFFERED` another thread's line would come between two.
    Where standard error is closed, nothing is told: `print` would take standard output, which is for answers.
    """
    if sys.stderr is not None:
        print(f"{text}\n", end="", file=sys.stderr, flush=True)


def is_watched() -> bool:
    """Whether standard error is a terminal, where a person sees a bar move."""
    return sys.stderr is not None and sys.stderr.isatty()


def complain(error: MiniGPT4Error) -> None:
    """Say what went wrong and how to mend it."""
    note(f"error: {error.message}")
    if error.hint:
        note(f"hint: {error.hint}")


def quiet(*, hub: bool = False) -> None:
    """Keep the libraries' bars and notices out of the terminal, errors aside, and the libraries off the network.

    To be called before they load. What the person has set holds, and then what the first call set.

    Args:
        hub: Let them ask the hub: the command needs a model of it.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if hub else "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def forgiving_streams() -> None:
    """Let no character that a terminal lacks, and no byte that is not UTF-8, end the program."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


@contextmanager
def patience(what: str, seconds: float = 3.0) -> Iterator[None]:
    """Say on a terminal what takes long, once it has taken so many seconds."""
    timer = threading.Timer(seconds, note, [what])
    if is_watched():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
