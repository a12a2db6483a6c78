"""Processes that read ahead of whoever trains or computes features: killed or stuck they are an error, never a wait.

They leave the cores to the trainer, and outlive the first signal that asks it to stop, which schedulers and torchrun
send to them as well: it still needs their batches. What they complain of comes as it was raised.
"""

import signal
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from minigpt4.errors import DataError, MiniGPT4Error
from minigpt4.training.stopping import num_echoes

TIMEOUT = 600.0
"""Seconds after which a reader that brings nothing is an error."""

Item = TypeVar("Item")


class _Told(Dataset[Any]):
    """A data set whose complaints are items: a reader's exception would come here as the text of its traceback."""

    def __init__(self, data: Dataset[Any]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]  # one that is gone through by numbers

    def __getitem__(self, item: int) -> Any:  # noqa: ANN401  (whatever a data set makes)
        try:
            return self._data[item]
        except MiniGPT4Error as error:
            return error


def read_ahead(data: Dataset[Item], workers: int, *, ahead: int) -> Generator[Item]:
    """Read a data set's items in their order.

    Args:
        data: Gone through by numbers.
        workers: Processes that read; 0 to read here.
        ahead: Items that each of them reads before they are asked for.

    Yields:
        The items.

    Raises:
        DataError: A process that reads ended; what the data set raises comes as it is.
        RuntimeError: The library's, wherever the program happens to be, where it missed one: see `readers_alive`.
    """
    with _any_number_of_readers():
        loader: Any = DataLoader(
            _Told(data),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            timeout=TIMEOUT if workers else 0,
            worker_init_fn=_begin_reading,
        )
        items = iter(loader)
    try:
        while True:
            try:
                item = next(items, None)
            except (EOFError, ConnectionError) as error:
                if "DataLoader worker" in str(error):  # raised by the data set, and brought here by the library
                    raise
                raise _reader_ended(error) from error  # killed while it handed an item over, and not missed yet
            if item is None:
                return
            if isinstance(item, MiniGPT4Error):
                raise item
            yield cast("Item", item)
    finally:
        _end_reading(items)


@contextmanager
def readers_alive() -> Iterator[None]:
    """Say in a sentence that a reader was killed, which the library notices wherever the program happens to be.

    Raises:
        DataError: It was.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise _reader_ended(error) from error


def _reader_ended(error: Exception) -> DataError:
    return DataError(
        f"a process that reads examples ended: {' '.join(str(error).split()) or type(error).__name__}",
        hint="it is often out of memory: fewer workers, or smaller batches; the same command goes on",
    )


@contextmanager
def _any_number_of_readers() -> Iterator[None]:
    """Begin as many readers as a recipe says, of which the library warns where there are fewer cores.

    They wait for disks as well, and a recipe goes from machine to machine.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _begin_reading(worker: int) -> None:
    """Begin a process that reads examples: leave the cores to the trainer, and the end as well.

    Args:
        worker: Its number, as `DataLoader` gives it.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    left = 1 + num_echoes()

    def outlive(number: int, frame: FrameType | None) -> None:
        # The trainer ends its readers by a message; one that hangs gets a signal from `DataLoader` and more at the end.
        nonlocal left
        left -= 1
        if not left:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, outlive)


def _end_reading(items: Iterator[Any]) -> None:
    """End the processes that read for an iterator of `DataLoader`, if there are any.

    Left to the collection of garbage, they would live as long as the traceback of an error does: to the end of the
    program, which then waits for readers that outlive its one signal.
    """
    end = getattr(items, "_shutdown_workers", None)
    if end:
        end()


def _as_it_is(item: Item) -> Item:
    """An item comes whole from the data set."""
    return item
