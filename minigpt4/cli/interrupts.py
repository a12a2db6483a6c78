"""Ctrl-C that is heard: a KeyboardInterrupt that gets lost is raised again.

Python raises it wherever the program is. Within a callback of the garbage collector, of which each import has one, it
is printed and dropped; somebody who presses Ctrl-C while libraries load would wait for a hub that never answers.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_SECONDS = 0.5
"""After which an interrupt counts as lost that nobody has heard and that is on its way to nobody."""


class Interrupts:
    """Raises KeyboardInterrupt at SIGINT until it is heard."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self._is_again = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Take the signal, from a person or from the timer.

        Raises:
            KeyboardInterrupt: Unless the timer's comes while one is on its way, and others clean up after themselves.
        """
        again, self._is_again = self._is_again, False
        self._wait()
        if not (again and isinstance(sys.exc_info()[1], KeyboardInterrupt)):
            raise KeyboardInterrupt

    def heard(self) -> None:
        """Raise it no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self.heard()
        self._timer = threading.Timer(AGAIN_SECONDS, self._send, [threading.get_ident()])
        self._timer.daemon = True
        self._timer.start()

    def _send(self, thread: int) -> None:
        self._is_again = True
        signal.pthread_kill(thread, signal.SIGINT)  # wakes it where it waits for something


_interrupts = Interrupts()
heard = _interrupts.heard


@contextmanager
def insisting() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt until it is `heard`, if Python's own handler is there.

    It is not in a thread, or where SIGINT is ignored, as in a shell's background.
    """
    is_there = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if os.name != "posix" or not is_there or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _interrupts.receive)
    try:
        yield
    finally:
        heard()
        signal.signal(signal.SIGINT, signal.default_int_handler)
