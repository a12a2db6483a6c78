"""Reading the records whose pictures are to be looked at, ahead of the one who looks; nothing is decoded twice."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from minigpt4.data.batches import SourceBatches
from minigpt4.data.examples import pixel_values
from minigpt4.errors import DataError, ImageError, MiniGPT4Error, PromptError
from minigpt4.training.feature_store import FeatureStore
from minigpt4.training.stopping import any_number_of_readers, begin_reading, end_reading

CHUNK = 8
"""Neighbouring records are read by one worker: they often show the same picture, and lie together on the disk."""


@dataclass(frozen=True)
class Read:
    """What was found in a record.

    Args:
        source: Number of its source.
        number: Its own there.
        digest: The sha256 of its encoded picture; None without one, and where the record is bad besides its picture.
        pixels: `(3, height, width)`; None where the picture was opened before, or cannot be.
        reason: Why the record or its picture cannot be used; None where it can.
    """

    source: int
    number: int
    digest: bytes | None = None
    pixels: Tensor | None = None
    reason: str | None = None


class _Chunks(Dataset[list[Read] | DataError]):
    def __init__(self, batches: SourceBatches, numbers: np.ndarray, store: FeatureStore, fresh: set[bytes]) -> None:
        self._batches = batches
        self._numbers = numbers
        self._store = store
        self._fresh = fresh
        self._opened: set[bytes] = set()

    def __len__(self) -> int:
        return -(-len(self._numbers) // CHUNK)

    def __getitem__(self, item: int) -> list[Read] | DataError:
        """Return the records of a chunk, or a complaint: an exception would come as a traceback's text."""
        try:
            return [self._read(int(s), int(n)) for s, n in self._numbers[item * CHUNK : (item + 1) * CHUNK]]
        except _NoMemoryError as error:
            return DataError(error.message, error.hint)

    def _read(self, source: int, number: int) -> Read:
        try:
            return self._looked_at(source, number)
        except (MiniGPT4Error, MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            name = self._batches.sources[source].name
            raise _NoMemoryError(
                f"there was not enough memory for record {number} of {name}",
                hint="fewer workers, or end what else needs memory; what was computed is kept",
            ) from error

    def _looked_at(self, source: int, number: int) -> Read:
        prompts = self._batches.prompts
        try:
            record = self._batches.record(source, number)
            self._batches.encoded(record, prompts[0] if prompts else "")  # all its texts: one bad makes it bad
        except (DataError, PromptError) as error:
            if _lacks_memory(error):
                raise
            return Read(source, number, reason=error.message)
        if record.picture is None:
            return Read(source, number)
        digest = hashlib.sha256(record.picture).digest()
        if digest in self._store or digest in self._fresh or digest in self._opened:
            return Read(source, number, digest)
        self._opened.add(digest)
        try:
            return Read(source, number, digest, pixel_values(record, self._batches.layout.processor, None))
        except ImageError as error:
            if _lacks_memory(error):
                raise
            return Read(source, number, digest, reason=error.message)


class _NoMemoryError(DataError):
    """The machine's fault, not a record's: kept as bad, a record would be left out where there is memory, too."""


def _lacks_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what it was raised from, says that there was not enough memory."""
    while error is not None:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # Python's way, and torch's
            return True
        error = error.__cause__
    return False


def read_ahead(
    batches: SourceBatches, numbers: np.ndarray, store: FeatureStore, fresh: set[bytes], workers: int
) -> Iterator[Read]:
    """Read records and open the pictures that are in no shard yet.

    Args:
        batches: Of the stage.
        numbers: `(records, 2)`: source and number of each.
        store: Pictures that need not be opened.
        fresh: Others of them, by digest.
        workers: Processes that read.

    Yields:
        The records in their order.

    Raises:
        DataError: A process that reads ended, or there was not enough memory for a record.
    """
    with any_number_of_readers():
        loader: Any = DataLoader(
            _Chunks(batches, numbers, store, fresh),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            worker_init_fn=begin_reading,
        )
        chunks = iter(loader)
    try:
        while True:
            try:
                chunk = next(chunks)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                raise DataError(
                    f"a process that reads pictures ended: {' '.join(str(error).split())}",
                    hint="it is often out of memory: fewer workers; what was computed is kept",
                ) from error
            if isinstance(chunk, DataError):
                raise chunk
            yield from chunk
    finally:
        end_reading(chunks)


def _as_it_is(chunk: list[Read] | DataError) -> list[Read] | DataError:
    return chunk
