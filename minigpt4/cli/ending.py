"""The end of a program that is one of the many processes of a run.

Threads of torch's process group drop what they worked on when they come to it; where the interpreter is gone by then, a
finished program aborts ("terminate called without an active exception"), and torchrun ends the others, the main process
while it writes the result. Leaving the group ends these threads, but after FSDP2 the library's caches keep the group.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End the program with what is done here, if it is one of many: all it printed is out, nothing else is waited for.

    An exception that is no exit goes on to the interpreter, which shows it.
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
