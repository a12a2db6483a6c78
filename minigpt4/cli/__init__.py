"""The command line: each command parses, calls one function and prints.

Answers and data go to standard output, everything else to standard error. Heavy libraries load inside the command that
needs them. A mistake of the user's is one sentence and a hint, exit status 2; `--debug` shows the traceback.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def main() -> None:
    """Run the command line."""
    with ending_at_once():
        try:
            from minigpt4.cli.run import run  # a third of a second, in which somebody may press Ctrl-C
        except KeyboardInterrupt:
            if sys.stderr is not None:
                print("stopped", file=sys.stderr)
            sys.exit(130)
        run()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End the program at once after what is done here, if it is one of the processes of a run.

    Threads of torch's process group drop what they worked on when they come to it; where the interpreter is gone by
    then, a finished program aborts ("terminate called without an active exception"), and torchrun ends the others, the
    main process while it writes the result. Leaving the group ends these threads, but FSDP2's caches keep the group.
    """
    if os.environ.get("WORLD_SIZE") in (None, "", "1"):
        yield
        return
    status: int | str | None = 0
    try:
        yield
    except SystemExit as end:
        status = end.code
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)
