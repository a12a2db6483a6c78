"""Writing tensor files piece by piece: a tensor need never be in memory as a whole.

Two formats: safetensors, and the archive that torch writes and every version since 1.6 reads. What is to be written is
known beforehand (`Entry`), so that all bytes have their place before the first is written.
"""

import hashlib
import itertools
import json
import math
import struct
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from minigpt4.weights.files.atomic import FileEntry, file_sha256
from minigpt4.weights.files.disk import fsync
from minigpt4.weights.files.safetensors_header import DTYPES, METADATA
from minigpt4.weights.files.stored import contiguous_strides

PIECE_BYTES = 4 * 2**20
"""Bytes of a piece: large enough for the disk, small enough to stay in the processor's cache."""

_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_FROM = 2**31
_ZIP64_FIELD_BYTES = 20
_WAITING = 2  # pieces that may wait to be written
_SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STORAGE_NAMES = {
    torch.float64: "DoubleStorage", torch.float32: "FloatStorage", torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage", torch.int64: "LongStorage", torch.int32: "IntStorage",
    torch.int16: "ShortStorage", torch.int8: "CharStorage", torch.uint8: "ByteStorage", torch.bool: "BoolStorage",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Args:
        name: Its name.
        dtype: Type of its elements.
        shape: Its shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.count * self.dtype.itemsize


Pieces = Callable[[str], Iterable[Tensor]]
"""Gives a tensor, by its name, flat and in pieces; a piece must stay good only until the next is asked for."""


def write_safetensors(path: Path, entries: Sequence[Entry], pieces: Pieces) -> FileEntry:
    """Write a safetensors file and bring it to the disk.

    Returns:
        Its size and its digest.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # every tensor at a place its type likes
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    ends = list(itertools.accumulate((entry.num_bytes for entry in ordered), initial=0))
    for entry, (start, end) in zip(ordered, itertools.pairwise(ends), strict=True):
        kind = _SAFETENSORS_NAMES[entry.dtype]
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, _writer() as write:
        _write(file, digest, len(text).to_bytes(8, "little") + text)
        for entry in ordered:
            for piece in _exactly(entry, pieces):
                write(partial(_write, file, digest, _bytes(piece)))
    fsync(path)
    return FileEntry(digest.hexdigest(), path.stat().st_size)


def write_torch_archive(path: Path, entries: Sequence[Entry], pieces: Pieces) -> FileEntry:
    """Write an archive as `torch.save` does of a dictionary of tensors, and bring it to the disk.

    Returns:
        Its size and its digest.
    """
    root = path.name.partition(".")[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, f"{root}/data.pkl", _pickle(entries))
        _add(archive, f"{root}/byteorder", b"little")
        for number, entry in enumerate(entries):
            with _member(archive, f"{root}/data/{number}", entry.num_bytes) as member, _writer() as write:
                for piece in _exactly(entry, pieces):
                    write(partial(member.write, _bytes(piece)))
        _add(archive, f"{root}/version", b"3\n")
    fsync(path)
    return FileEntry(file_sha256(path), path.stat().st_size)


def _exactly(entry: Entry, pieces: Pieces) -> Iterator[Tensor]:
    """Pass a tensor's pieces on; the file is laid out for just so many elements of one type."""
    count = 0
    for piece in pieces(entry.name):
        if piece.dtype != entry.dtype:
            raise TypeError(f"{entry.name}: {piece.dtype}, expected {entry.dtype}")
        count += piece.numel()
        yield piece
    if count != entry.count:
        raise ValueError(f"{entry.name}: {count} elements, expected {entry.count}")


def _bytes(piece: Tensor) -> bytes:
    return piece.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _write(file: IO[bytes], digest: "hashlib._Hash", data: bytes) -> None:
    digest.update(data)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@contextmanager
def _writer() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Write in a thread of its own, in order, a few pieces behind: while one is written the next is read."""
    waiting: deque[Future[object]] = deque()
    with ThreadPoolExecutor(1) as thread:

        def write(job: Callable[[], object]) -> None:
            waiting.append(thread.submit(job))
            if len(waiting) > _WAITING:
                waiting.popleft().result()

        yield write
        for job in waiting:
            job.result()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    with _member(archive, name, len(content)) as member:
        member.write(content)


def _member(archive: zipfile.ZipFile, name: str, size: int) -> IO[bytes]:
    """Open a member whose bytes begin at a multiple of 64, where they can be mapped."""
    info = zipfile.ZipInfo(name)
    info.file_size = size
    large = size >= _ZIP64_FROM
    start = archive.start_dir + _LOCAL_HEADER_BYTES + len(name) + (_ZIP64_FIELD_BYTES if large else 0) + 4
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return archive.open(info, "w", force_zip64=large)


def _pickle(entries: Sequence[Entry]) -> bytes:
    """Spell what `torch.save` pickles: each tensor rebuilt from a storage, with its offset, shape and strides."""
    parts = [b"\x80\x02}("]
    for number, entry in enumerate(entries):
        storage = _text("storage") + f"ctorch\n{_STORAGE_NAMES[entry.dtype]}\n".encode() + _text(str(number))
        storage = b"(" + storage + _text("cpu") + _integer(entry.count) + b"tQ"
        shape, strides = _tuple(entry.shape), _tuple(contiguous_strides(entry.shape))
        hooks = b"ccollections\nOrderedDict\n)R"
        tensor = b"(" + storage + _integer(0) + shape + strides + b"\x89" + hooks + b"t"
        parts.append(_text(entry.name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + tensor + b"R")
    return b"".join([*parts, b"u."])


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
