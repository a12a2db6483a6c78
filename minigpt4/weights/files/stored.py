"""A tensor that lies in a file: where its bytes are, and how they are read.

Nothing is read until it is asked for, and then only that tensor's bytes, mapped into memory or copied piece by piece.
Where the file has a checksum of them, they are compared with it before they are given away as whole. Of the formats
only archives have one; in a safetensors file or a bare pickle a flipped bit is another number.
This module knows no formats.
"""

import math
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights.files.disk import storing

CHECKED_BYTES = 2**20
"""Bytes that are read at once to be compared with a checksum."""


@dataclass
class Checksum:
    """What a file says of a stretch of its bytes, in which one or more tensors lie.

    Args:
        tensor: Name of a tensor there, for the error.
        start: Place of the first byte in the file.
        size: Number of bytes.
        crc32: Their CRC-32, as the file says.
        confirmed: Whether they were compared; they are once.
    """

    tensor: str
    start: int
    size: int
    crc32: int
    confirmed: bool = False

    def confirm(self, path: Path) -> None:
        """Read the bytes and compare them, unless that was done.

        Raises:
            WeightsError: They differ, or the file became shorter.
            StorageError: The file cannot be read.
        """
        if self.confirmed:
            return
        found = 0
        buffer = memoryview(bytearray(min(CHECKED_BYTES, self.size)))
        with storing(path, doing="read"), path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, self.size, CHECKED_BYTES):
                part = buffer[: min(CHECKED_BYTES, self.size - first)]
                _fill(file, part, path)
                found = zlib.crc32(part, found)
        self.compare(path, found)

    def compare(self, path: Path, found: int) -> None:
        """Take the CRC-32 that was found.

        Raises:
            WeightsError: It is another.
        """
        if found != self.crc32:
            raise WeightsError(
                f"the tensor {self.tensor} in {path} is damaged: its bytes have the checksum {found:08x}, the file "
                f"says {self.crc32:08x}",
                "download or copy the file again",
            )
        self.confirmed = True


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
        checksum: What the file says of these bytes, or of more bytes that they lie in; None where it says nothing.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    extent: int
    checksum: Checksum | None = field(default=None, compare=False)

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
            WeightsError: The bytes are not those that the file's checksum is of, or the file became shorter.
            StorageError: The file cannot be read.
        """
        if self.count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.checksum is not None:
            self.checksum.confirm(self.path)
        flat = _mapped(self.path, self.start, self.extent * self.dtype.itemsize)
        if self.start % self.dtype.itemsize:
            flat = flat.clone()  # the bytes do not lie where the processor wants numbers of this size
        # One element may have any stride; torch calls it contiguous and will not look at its bytes all the same.
        strides = contiguous_strides(self.shape) if self.is_contiguous else self.strides
        return flat.view(self.dtype).as_strided(self.shape, strides)

    def rows(self, first: int, count: int) -> Tensor:
        """Read some rows of a table, flat: a sample, which is not compared with the file's checksum.

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

        A piece is good until the next one is asked for. The last piece comes after the comparison with the file's
        checksum.

        Raises:
            WeightsError: The bytes are not those that the file's checksum is of, or the file became shorter.
            StorageError: The file cannot be read.
        """
        step = max(1, num_bytes // self.dtype.itemsize)
        if not self.is_contiguous:
            yield from self.read().flatten().split(step)
            return
        alone = self.checksum if self._fills_checksum() else None
        if self.checksum is not None and alone is None:
            self.checksum.confirm(self.path)  # its bytes are more than these
        buffer = torch.empty(min(step, self.count), dtype=self.dtype)
        raw = buffer.view(torch.uint8).numpy().data
        found = 0
        with storing(self.path, doing="read"), self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, self.count, step):
                size = min(step, self.count - first)
                part = raw[: size * self.dtype.itemsize]
                _fill(file, part, self.path)
                if alone is not None and not alone.confirmed:
                    found = zlib.crc32(part, found)
                    if first + size == self.count:
                        alone.compare(self.path, found)
                yield buffer[:size]

    def _fills_checksum(self) -> bool:
        """Whether the checksum is of this tensor's bytes and no others."""
        checksum = self.checksum
        return checksum is not None and (checksum.start, checksum.size) == (self.start, self.num_bytes)


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
