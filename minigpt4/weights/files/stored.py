"""A tensor that lies in a file: where its bytes are, and how they are read.

Nothing is read until it is asked for, and then only that tensor's bytes, mapped into memory or copied piece by piece.
This module knows neither formats nor names.
"""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights.files.disk import storing


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Args:
        path: The file.
        dtype: Type of its elements.
        shape: Its shape.
        strides: Steps between neighbours along each dimension, in elements.
        start: Place of its first element in the file, in bytes.
        extent: Elements from the first to the last one inclusive; 0 for an empty tensor.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    extent: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in memory."""
        return self.count * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in the file in their order, without gaps."""
        return self.strides == contiguous_strides(self.shape) or self.extent == self.count <= 1

    def read(self) -> Tensor:
        """Return the tensor, its bytes mapped from the file: a change to it does not reach the file.

        Raises:
            WeightsError: The file became shorter.
            StorageError: The file cannot be read.
        """
        if self.count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = _mapped(self.path, self.start, self.extent * self.dtype.itemsize)
        if self.start % self.dtype.itemsize:
            flat = flat.clone()  # the bytes do not lie where the processor wants numbers of this size
        return flat.view(self.dtype).as_strided(self.shape, self.strides)

    def rows(self, first: int, count: int) -> Tensor:
        """Read some rows of a table, flat.

        Args:
            first: The first row.
            count: How many.
        """
        if not self.is_contiguous:
            return self.read()[first : first + count].flatten()
        width = self.count // self.shape[0]
        start = self.start + first * width * self.dtype.itemsize
        return StoredTensor(self.path, self.dtype, (count * width,), (1,), start, count * width).read()

    def pieces(self, num_bytes: int) -> Iterator[Tensor]:
        """Yield the tensor, flat and in order, in pieces that share one buffer of at most `num_bytes`.

        A piece is good until the next one is asked for.

        Raises:
            WeightsError: The file became shorter.
            StorageError: The file cannot be read.
        """
        step = max(1, num_bytes // self.dtype.itemsize)
        if not self.is_contiguous:
            yield from self.read().flatten().split(step)
            return
        buffer = torch.empty(min(step, self.count), dtype=self.dtype)
        raw = buffer.view(torch.uint8).numpy().data
        with storing(self.path, doing="read"), self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, self.count, step):
                size = min(step, self.count - first)
                _fill(file, raw[: size * self.dtype.itemsize], self.path)
                yield buffer[:size]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor whose elements lie in their order, without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _fill(file: FileIO, part: memoryview, path: Path) -> None:
    done = 0
    while done < len(part):
        count = file.readinto(part[done:])
        if not count:
            raise _shorter(path)
        done += count


def _mapped(path: Path, start: int, size: int) -> Tensor:
    """Map a stretch of a file as bytes: private, so that the file stays as it is."""
    first = start - start % mmap.ALLOCATIONGRANULARITY
    with storing(path, doing="read"), path.open("rb") as file:
        try:
            # The map lives as long as the tensor on it.
            area = mmap.mmap(file.fileno(), start - first + size, access=mmap.ACCESS_COPY, offset=first)
        except ValueError as error:  # longer than the file
            raise _shorter(path) from error
    return torch.frombuffer(area, dtype=torch.uint8, count=size, offset=start - first)


def _shorter(path: Path) -> WeightsError:
    return WeightsError(f"{path} became shorter while it was read", "let no other program write there, and try again")
