"""Being told to stop: the update that runs is finished and saved first.

SIGTERM comes from schedulers, SIGINT from a person at the keyboard; a second one stops at once. Schedulers and torchrun
send it to the readers of examples as well, which the trainer still needs: they outlive the first one.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether this process was told to stop, and by which signal.

    Args:
        told: Called at the first signal: an update may take minutes.
    """

    def __init__(self, told: Callable[[], None] = lambda: None) -> None:
        self.signal: int | None = None
        self.told = told

    @property
    def asked(self) -> bool:
        """Whether it was told to."""
        return self.signal is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Take a signal; the second stops at once."""
        if self.signal is not None:
            self.obey()
        self.signal = number
        self.told()

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
def stop_requests(told: Callable[[], None] = lambda: None) -> Iterator[StopRequest]:
    """Collect the signals that ask to stop; elsewhere than in the main thread none come."""
    request = StopRequest(told)
    try:
        before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    except ValueError:  # not the main thread
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begin_reading(worker: int) -> None:
    """Begin a process that reads examples: leave the cores to the trainer, and the end as well.

    Args:
        worker: Its number, as `DataLoader` gives it.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive_once)


def _outlive_once(number: int, frame: FrameType | None) -> None:
    # The trainer ends its readers by a message; one that hangs gets a signal from `DataLoader` and one more at the end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
