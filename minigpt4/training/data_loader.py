"""What comes to a training loop from outside: batches that worker processes read ahead, bad examples, and signals.

Workers leave the cores to the trainer, and survive the first signal that asks it to stop, which schedulers and torchrun
send to them as well: it still needs their batches. A worker that is killed or stuck is an error, never a wait.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset

from minigpt4.data.batches import BadSample
from minigpt4.errors import DataError, MiniGPT4Error
from minigpt4.text import counted
from minigpt4.training.checkpoint import State
from minigpt4.training.processes import by_the_main_process, summed
from minigpt4.training.recipe import Recipe
from minigpt4.training.run_folder import BAD_SAMPLES_FILE, append_line

WORKER_TIMEOUT = 600.0
"""Seconds without an item after which a worker is an error."""

BAD_WINDOW = 1000
"""The last examples, of which a share may be bad."""
BAD_GROUP_LIMIT = 20
"""Bad examples of a shard, without a good one since the first of them, that make the shard itself an error."""

Item = TypeVar("Item")


class _ErrorsAsItems(Dataset[Any]):
    """A data set that returns its errors: a worker's exception would arrive as the text of its traceback."""

    def __init__(self, data: Dataset[Any]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]  # map-style

    def __getitem__(self, item: int) -> Any:  # noqa: ANN401  (whatever a data set makes)
        try:
            return self._data[item]
        except MiniGPT4Error as error:
            return error


def read_ahead(data: Dataset[Item], workers: int, *, ahead: int) -> Generator[Item]:
    """Read a data set's items in their order.

    Args:
        data: A map-style data set.
        workers: Processes that read; 0 to read here.
        ahead: Items that each of them reads before they are asked for.

    Raises:
        DataError: A worker ended; what the data set raises comes as it was raised.
        RuntimeError: The library's, wherever the program happens to be, when it missed a worker: see `workers_alive`.
    """
    with warnings.catch_warnings():
        # Workers wait for disks as well, and a recipe goes from machine to machine.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: Any = DataLoader(
            _ErrorsAsItems(data),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            timeout=WORKER_TIMEOUT if workers else 0,
            worker_init_fn=_start_worker,
        )
        items = iter(loader)
    try:
        while True:
            try:
                item = next(items, None)
            except (EOFError, ConnectionError) as error:
                if "DataLoader worker" in str(error):  # raised by the data set, and brought here by the library
                    raise
                raise _worker_ended(error) from error  # killed while it handed an item over, and not missed yet
            if item is None:
                return
            if isinstance(item, MiniGPT4Error):
                raise item
            yield cast("Item", item)
    finally:
        # Garbage collection would come only with the end of an error's traceback, that is of the program, which then
        # waits for workers that survive its one signal.
        if end := getattr(items, "_shutdown_workers", None):
            end()


@contextmanager
def workers_alive() -> Iterator[None]:
    """Turn the library's error about a killed worker, which it raises anywhere in the program, into one sentence.

    Raises:
        DataError: A worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise _worker_ended(error) from error


def _worker_ended(error: Exception) -> DataError:
    return DataError(
        f"a process that reads examples ended: {' '.join(str(error).split()) or type(error).__name__}",
        hint="it is often out of memory: fewer workers, or smaller batches; the same command goes on",
    )


def _start_worker(worker: int) -> None:
    """Leave the cores, and the end of the run, to the trainer; `worker` is the number that `DataLoader` gives."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    left = 1 + _num_echoes()

    def survive(number: int, frame: FrameType | None) -> None:
        # The trainer ends its workers by a message; one that hangs gets a signal from `DataLoader` and more at the end.
        nonlocal left
        left -= 1
        if not left:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, survive)


def _unchanged(item: Item) -> Item:
    return item


def _num_echoes() -> int:
    """Return how many more SIGTERM one request brings: torchrun passes on what a scheduler sent to all processes."""
    return 1 if "TORCHELASTIC_RUN_ID" in os.environ else 0


class StopRequest:
    """The signal that asked this process to stop, if one did."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._echoes = _num_echoes()
        self.received: SimpleQueue[bool] = SimpleQueue()  # the one queue that a signal's handler may write to

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; the second stops at once, unless torchrun passed it on."""
        if self.signal is not None:
            if number == signal.SIGTERM and self._echoes:
                self._echoes -= 1
                return
            self.obey()
        self.signal = number
        self.received.put(True)

    def obey(self) -> NoReturn:
        """Stop.

        Raises:
            KeyboardInterrupt: After SIGINT.
            SystemExit: After SIGTERM, or if another process was asked: 128 + 15, as in a shell.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def stop_requests(on_stop_request: Callable[[], None]) -> Iterator[StopRequest]:
    """Collect SIGTERM, which schedulers send, and SIGINT; none arrive outside the main thread.

    Args:
        on_stop_request: Called soon after the first signal, in another thread: an update may take minutes, and a
            handler may interrupt a write to the terminal.
    """
    request = StopRequest()

    def wait() -> None:
        if request.received.get():
            on_stop_request()

    try:
        before = {number: signal.signal(number, request.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield request
        return
    try:
        threading.Thread(target=wait, daemon=True).start()
        yield request
    finally:
        request.received.put(False)
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class BadSamples:
    """List and count of the examples that could not be used; too many of them end the run.

    Args:
        recipe: The run's, with the share that may be bad.
        processes: The processes of the run.
        state: Holds the counts, so that a resumed run stops where an uninterrupted one would.
    """

    recipe: Recipe
    processes: PartialState
    state: State

    def add(self, stage: str, step: int, batches: Sequence[dict[str, Any]]) -> None:
        """Count the bad examples of an update's batches.

        Raises:
            DataError: Too many were bad, or all of a shard.
        """
        bad: list[BadSample] = [sample for batch in batches for sample in batch.get("bad", [])]
        read = sum(len(batch.get("keys", [])) for batch in batches) + len(bad)
        bad_count, all_read = (int(value) for value in summed([len(bad), read], self.processes))
        self._count_good(batches)
        if bad_count:
            bad = self._gathered(bad)
            by_the_main_process(lambda: self._write(stage, step, bad), self.processes)
            for sample in bad:
                self.state.groups.setdefault(sample.group, [0, 0])[1] += 1
        recent = self.state.recent_bad
        recent.append([bad_count, all_read])
        while sum(count for _, count in recent[1:]) >= BAD_WINDOW:
            recent.pop(0)
        self._judge(bad)

    def _count_good(self, batches: Sequence[dict[str, Any]]) -> None:
        groups = [group for batch in batches for group in batch.get("groups", []) if group in self.state.groups]
        known = sorted(self.state.groups)  # the same in all processes
        counts = summed([float(groups.count(group)) for group in known], self.processes) if known else []
        for group, count in zip(known, counts, strict=True):
            self.state.groups[group][0] += int(count)

    def _gathered(self, bad: list[BadSample]) -> list[BadSample]:
        if self.processes.num_processes == 1:
            return bad
        lists: list[list[BadSample]] = [[] for _ in range(self.processes.num_processes)]
        torch.distributed.all_gather_object(lists, bad)
        return [sample for one in lists for sample in one]

    def _write(self, stage: str, step: int, bad: Sequence[BadSample]) -> None:
        for sample in bad:
            append_line(self.recipe.output / BAD_SAMPLES_FILE, {"stage": stage, "step": step, **asdict(sample)})

    def _judge(self, bad: Sequence[BadSample]) -> None:
        count, read = (sum(counts) for counts in zip(*self.state.recent_bad, strict=True))
        path = self.recipe.output / BAD_SAMPLES_FILE
        if count > self.recipe.max_bad_fraction * BAD_WINDOW:
            last = f"; the last: {bad[-1].key}: {bad[-1].reason}" if bad else ""
            raise DataError(
                f"{count:,} of the last {counted(read, 'example')} {'is' if count == 1 else 'are'} bad, "
                f"up to {self.recipe.max_bad_fraction:.1%} of {BAD_WINDOW:,} are passed over{last}",
                hint=f"{path} lists them; mend the data, or raise max_bad_fraction",
            )
        for group, (good, wrong) in self.state.groups.items():
            if wrong >= BAD_GROUP_LIMIT and not good:
                raise DataError(
                    f"the last {wrong} examples of {group} are all bad", hint=f"{path} lists them; mend the data"
                )
