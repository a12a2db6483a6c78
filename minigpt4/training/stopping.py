"""Being told to stop: the update that runs is finished and saved first.

SIGTERM comes from schedulers, SIGINT from a person at the keyboard; a second one stops at once. Schedulers and torchrun
send it to the readers of examples as well (`readers.py`). Where both are there a process gets it twice, from the
scheduler and from torchrun, which passes its own on: that is one request.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def num_echoes() -> int:
    """Return how many more SIGTERM may come of one request: torchrun passes on what a scheduler sent to all."""
    return 1 if "TORCHELASTIC_RUN_ID" in os.environ else 0


class StopRequest:
    """Whether this process was told to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._echoes = num_echoes()
        self.heard: SimpleQueue[bool] = SimpleQueue()  # the one queue that a signal's handler may write to

    @property
    def asked(self) -> bool:
        """Whether it was told to."""
        return self.signal is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Take a signal; the second stops at once, unless torchrun passed it on."""
        if self.signal is not None:
            if number == signal.SIGTERM and self._echoes:
                self._echoes -= 1
                return
            self.obey()
        self.signal = number
        self.heard.put(True)

    def obey(self) -> NoReturn:
        """Stop.

        Raises:
            KeyboardInterrupt: After SIGINT.
            SystemExit: After SIGTERM, or where another process was told: 128 + 15, as the shell counts.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def stop_requests(told: Callable[[], None]) -> Iterator[StopRequest]:
    """Collect the signals that ask to stop; elsewhere than in the main thread none come.

    Args:
        told: Called soon after the first signal, in another thread: an update may take minutes. A handler may come in
            the middle of what the terminal is being told, and cannot tell it more.
    """
    request = StopRequest()
    try:
        before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    except ValueError:  # not the main thread
        yield request
        return
    try:
        threading.Thread(target=_tell, args=[request, told], daemon=True).start()
        yield request
    finally:
        request.heard.put(False)
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(request: StopRequest, told: Callable[[], None]) -> None:
    if request.heard.get():
        told()
