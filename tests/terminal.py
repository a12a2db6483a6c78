"""A program on a pseudo terminal, as a person has it: what is typed, and what is waited for."""

import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SILENCE_SECONDS = 300
"""So long a program that prints nothing is thought to hang; a busy machine needs a minute to load torch."""

# Makes its standard input the terminal of its session, so that Ctrl-C becomes a signal, and then the program.
_LAUNCHER = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """One running program; `said` is what it has printed and nobody has waited for."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self.descriptor = descriptor
        self.said = ""

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.descriptor, keys)

    def wait_for(self, text: str) -> None:
        """Read until the program has printed a text, and forget everything up to its end."""
        while text not in self.said:
            assert self.read_more(), f"the program ended without {text!r}: {self.said!r}"
        self.said = self.said.partition(text)[2]

    def wait_for_anything(self) -> None:
        """Read until there is something that nobody has waited for."""
        while not self.said.strip():
            assert self.read_more(), "the program ended"

    def wait_for_end(self) -> int:
        """Read until the program ends; return its exit status as a shell tells it.

        Python ends by the signal itself where an import was interrupted.
        """
        while self.read_more():
            pass
        status = self.process.wait()
        return status if status >= 0 else 128 - status

    def read_more(self) -> bool:
        """Read what is printed next; False once the program has ended."""
        assert select.select([self.descriptor], [], [], SILENCE_SECONDS)[0], f"it hangs after {self.said!r}"
        try:
            more = os.read(self.descriptor, 65536)
        except OSError:  # so Linux says that nobody has the other end open any more
            return False
        self.said += more.decode(errors="replace")
        return bool(more)


@contextmanager
def on_a_terminal(command: list[str]) -> Iterator[Terminal]:
    """Run a command on a terminal that knows no escape sequences, so that it prints words alone."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
