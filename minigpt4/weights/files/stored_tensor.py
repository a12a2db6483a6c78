"""A tensor that lies in a file: where its bytes are, and how they are read. And the header of a `.safetensors` file.

Nothing is read until it is asked for, and then only that tensor's bytes, mapped into memory or copied piece by piece.
Where the file has a checksum of them, it is compared. Of the formats only PyTorch's archives have one: in a safetensors
file or a bare pickle a flipped bit is another number, and only a manifest (`atomic`) or a look at the numbers can tell.
"""

import json
import math
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.text import first_line
from minigpt4.weights.files.disk import storing

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
"""Types of elements, by their names in a safetensors file."""

METADATA = "__metadata__"
CHECKED_BYTES = 2**20
"""Bytes that are read at once to be compared with a checksum."""


@dataclass
class Member:
    """A member of an archive: the bytes that one or more tensors lie in, with their checksum.

    Args:
        start: Place of the first byte in the file.
        size: Number of bytes.
        crc32: Their CRC-32, as the file says; None where it says nothing, or once it was compared.
        tensor: Name of a tensor in it, for the error.
    """

    start: int
    size: int
    crc32: int | None
    tensor: str = ""

    def confirm(self, path: Path) -> None:
        """Read the bytes and compare them with the checksum, unless that was done.

        Raises:
            WeightsError: They differ, or the file became shorter.
            StorageError: The file cannot be read.
        """
        if self.crc32 is None:
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
        """Compare the checksum with that of the bytes that were read; raise WeightsError if they differ."""
        if self.crc32 is not None and found != self.crc32:
            raise WeightsError(
                f"the tensor {self.tensor} in {path} is damaged: its bytes have the checksum {found:08x}, the file "
                f"says {self.crc32:08x}",
                "download or copy the file again",
            )
        self.crc32 = None


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Args:
        path: The file.
        dtype: Type of its elements.
        shape: Its shape.
        strides: Steps between neighbours along each dimension, in elements.
        start: Place of its first element in the file, in bytes.
        member: The member of an archive it lies in.
        memory: The tensor itself, of a file that cannot be read tensor by tensor.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    member: Member | None = field(default=None, compare=False)
    memory: Tensor | None = field(default=None, compare=False)

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in memory."""
        return self.count * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Elements from the first to the last one inclusive; 0 for an empty tensor."""
        return self.count and 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))

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
        # One element may have any stride; torch calls it contiguous and will not look at its bytes all the same.
        strides = contiguous_strides(self.shape) if self.is_contiguous else self.strides
        if self.memory is not None:
            return self.memory.as_strided(self.shape, strides)
        if self.count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.member is not None:
            self.member.confirm(self.path)
        flat = _mapped(self.path, self.start, self.extent * self.dtype.itemsize)
        if self.start % self.dtype.itemsize:
            flat = flat.clone()  # the bytes do not lie where the processor wants numbers of this size
        return flat.view(self.dtype).as_strided(self.shape, strides)

    def rows(self, first: int, count: int) -> Tensor:
        """Read `count` rows of a table from row `first`, flat: a sample, not compared with the file's checksum."""
        if self.memory is not None or not self.is_contiguous:
            return self.read()[first : first + count].flatten()
        width = self.count // self.shape[0]
        start = self.start + first * width * self.dtype.itemsize
        return StoredTensor(self.path, self.dtype, (count * width,), (1,), start).read()

    def pieces(self, num_bytes: int) -> Iterator[Tensor]:
        """Yield the tensor, flat and in order, in pieces that share one buffer of at most `num_bytes`.

        A piece is good until the next one is asked for. The last piece comes after the comparison with the file's
        checksum.

        Raises:
            WeightsError: The bytes are not those that the file's checksum is of, or the file became shorter.
            StorageError: The file cannot be read.
        """
        step = max(1, num_bytes // self.dtype.itemsize)
        if self.memory is not None or not self.is_contiguous:
            yield from self.read().flatten().split(step)
            return
        member = self.member
        if member is not None and (member.start, member.size) != (self.start, self.num_bytes):
            member.confirm(self.path)  # its bytes are more than these
        buffer = torch.empty(min(step, self.count), dtype=self.dtype)
        raw = buffer.view(torch.uint8).numpy().data
        found = 0
        with storing(self.path, doing="read"), self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, self.count, step):
                size = min(step, self.count - first)
                part = raw[: size * self.dtype.itemsize]
                _fill(file, part, self.path)
                if member is not None and member.crc32 is not None:
                    found = zlib.crc32(part, found)
                    if first + size == self.count:
                        member.compare(self.path, found)
                yield buffer[:size]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor whose elements lie in their order, without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read_safetensors_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read what a safetensors file holds: its tensors, in the order of their bytes, and its notes.

    Raises:
        WeightsError: Not such a file, or a damaged one.
        OSError: It cannot be read.
    """
    try:
        # The library checks names, types, shapes and places; it does not tell the places. Not for torch, which would
        # map the file in a way that counts as memory: a file larger than that could not be opened.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        if "(os error" in str(error):  # of the disk: `storing` says it
            raise
        raise refused(path, f"it is damaged, or no safetensors file ({first_line(error)[:100]})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    notes = header.pop(METADATA, None) or {}
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise refused(path, f"the type {entry['dtype']} of tensor {name[:80]} is not read")
        shape = tuple(entry["shape"])
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, DTYPES[entry["dtype"]], shape, contiguous_strides(shape), start)
    return tensors, notes


def refused(path: Path, why: str, hint: str = "download the file again from its publisher") -> WeightsError:
    """Make the error for a file that is not believed."""
    return WeightsError(f"{path} was not opened: {why}", hint)


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
