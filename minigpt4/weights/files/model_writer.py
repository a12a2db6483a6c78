"""Writing a language model's folder: weights in files of bounded size, an index, small files; whole, and resumable.

The files are built in `.NAME.partial` beside the folder to be. Each one is brought to the disk, and noted with its
digest in a journal, before the next is begun; the same work begun again keeps what the journal lists, after reading it
once more. At the end the folder takes its place by one rename, as in `atomic`. Until then the target is absent.

A tensor need never be in memory as a whole (`safetensors` and `torch.save` want a file's tensors at once, 1 GB here):
what is to be written is known beforehand (`Entry`), so that all bytes have their place before the first is written.
Where the numbers come from is the caller's business.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import struct
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from minigpt4.errors import StorageError, WeightsError
from minigpt4.weights.files.atomic import FileEntry, clean_stale, file_sha256, files_in, move_folder, refuse_existing
from minigpt4.weights.files.disk import fsync, fsync_folder, lock, make_folder, require_free_space, storing
from minigpt4.weights.files.stored_tensor import DTYPES, METADATA, contiguous_strides

SHARD_BYTES = 2**30
"""What an interrupted run writes anew at most."""

OTHER_FILES_BYTES = 32 * 2**20
"""Room for the configuration, the tokenizer and the index."""

PIECE_BYTES = 4 * 2**20
"""Bytes of a piece: large enough for the disk, small enough to stay in the processor's cache."""

Format = Literal["safetensors", "bin"]
Report = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes of it are done, and of how many."""

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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

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


Pieces = Callable[[Entry], Iterable[Tensor]]
"""Gives a tensor flat and in pieces; a piece must stay good only until the next is asked for."""


def write_model(
    target: Path,
    entries: Sequence[Entry],
    pieces: Pieces,
    small: Mapping[str, bytes],
    *,
    sources: Mapping[str, Sequence[Path]],
    file_format: Format = "safetensors",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    report: Report | None = None,
) -> int:
    """Write a folder.

    Args:
        target: The folder to appear, whole or not at all.
        entries: The tensors, in order.
        pieces: Gives a tensor, flat and in pieces.
        small: The other files by their path in the folder, with `/`.
        sources: The files the numbers come from, by what is done with them: an interrupted run is continued only
            where they are the same.
        file_format: `safetensors`, or `bin` for archives of torch.
        shard_bytes: Size of a weight file; a larger tensor has a file of its own.
        overwrite: Replace a folder that has a manifest.
        report: Called as the writing goes on.

    Returns:
        How many files were there from an interrupted run.

    Raises:
        StorageError: The target exists and may not be replaced, or there is no room for it.
    """
    shards = _shards(entries, file_format, shard_bytes)
    total = sum(entry.num_bytes for entry in entries)
    small = {**small, **_index(shards, file_format, total)}
    require_free_space(target, total + OTHER_FILES_BYTES - _present(partial_path(target)))
    write_shard = write_safetensors if file_format == "safetensors" else write_torch_archive
    done = 0
    with resume_folder(target, _work(shards, small, sources), overwrite=overwrite) as folder:
        kept = len(folder.done)
        for file, group in shards.items():
            folder.write(file, partial(write_shard, entries=group, pieces=pieces))
            done += sum(entry.num_bytes for entry in group)
            if report:
                report("writing the model", done, total)
        for name, content in small.items():
            folder.write(name, partial(_write_small, content=content))
    return kept


def kept_note(kept: int) -> str:
    """Say how many files were there from an interrupted run, which `write_model` returned."""
    return f"{kept} {'file was' if kept == 1 else 'files were'} there from an interrupted run"


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Spell a small file in JSON."""
    return (json.dumps(content, indent=2) + "\n").encode()


def _write_small(path: Path, content: bytes) -> FileEntry:
    path.write_bytes(content)
    return FileEntry(hashlib.sha256(content).hexdigest(), len(content))


def _shards(entries: Sequence[Entry], file_format: Format, limit: int) -> dict[str, list[Entry]]:
    """Group the tensors into files, in their order."""
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.num_bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.num_bytes
    count = len(groups)
    if file_format == "bin":
        return {f"pytorch_model-{number}.bin": group for number, group in enumerate(groups)}
    if count == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05}-of-{count:05}.safetensors": group for number, group in enumerate(groups, start=1)}


def _index(shards: Mapping[str, Sequence[Entry]], file_format: Format, total: int) -> dict[str, bytes]:
    if file_format == "safetensors" and len(shards) == 1:
        return {}
    places = {entry.name: file for file, entries in shards.items() for entry in entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    name = "model.safetensors.index.json" if file_format == "safetensors" else "pytorch_model.bin.index.json"
    return {name: json_bytes(index)}


def _present(partial_folder: Path) -> int:
    """Count the bytes that an interrupted run left, which will be kept or removed first."""
    if not partial_folder.is_dir():
        return 0
    with storing(partial_folder, doing="read"):
        return sum(path.stat().st_size for path in partial_folder.rglob("*") if path.is_file())


def _work(
    shards: Mapping[str, Sequence[Entry]], small: Mapping[str, bytes], sources: Mapping[str, Sequence[Path]]
) -> str:
    """Describe the work by a digest, so that only the same work is continued."""
    content = {
        "sources": {what: [_identity(path) for path in paths] for what, paths in sources.items()},
        "shards": {
            file: [(entry.name, str(entry.dtype), entry.shape) for entry in group] for file, group in shards.items()
        },
        "small": {name: hashlib.sha256(content).hexdigest() for name, content in small.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identity(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.absolute()), status.st_size, status.st_mtime_ns


# Resuming


class PartialFolder:
    """A folder in the making: `place/content`, with a journal of its finished files, `done`.

    Args:
        place: Where it is built.
        work: What identifies the work; files of other work are of no use.
    """

    def __init__(self, place: Path, work: str) -> None:
        self.content = place / "content"
        self._journal = place / "journal.json"
        self._work = work
        self.done: dict[str, FileEntry] = {}

    def write(self, name: str, make: Callable[[Path], FileEntry]) -> bool:
        """Make a file, unless it is there from an earlier run; return whether it was made now.

        Args:
            name: Its path in the folder, with `/`.
            make: Writes it to the path it is given and says what it wrote.
        """
        if name in self.done:
            return False
        path = self.content / name
        make_folder(path.parent)
        entry = make(path)
        with storing(path):
            fsync(path)
            fsync_folder(path.parent)
            self.done[name] = entry
            new = self._journal.with_suffix(".new")
            files = {name: asdict(entry) for name, entry in self.done.items()}
            new.write_text(json.dumps({"work": self._work, "files": files}, indent=1) + "\n", encoding="utf-8")
            fsync(new)
            os.replace(new, self._journal)
            fsync_folder(self._journal.parent)
        return True

    def resume(self) -> None:
        """Keep what an earlier run of the same work finished and what still has its digest; remove all else."""
        self.content.mkdir(parents=True, exist_ok=True)
        listed = self._listed()
        for name in files_in(self.content):
            entry, path = listed.get(name), self.content / name
            if entry is not None and path.stat().st_size == entry.size and file_sha256(path) == entry.sha256:
                self.done[name] = entry
            else:
                logger.info("%s of an interrupted run is made again", name)
                path.unlink()
        for folder in sorted(self.content.rglob("*/"), reverse=True):  # the innermost first
            if not os.listdir(folder):
                folder.rmdir()

    def _listed(self) -> dict[str, FileEntry]:
        try:
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
            if journal["work"] != self._work:
                return {}
            return {name: FileEntry(entry["sha256"], entry["size"]) for name, entry in journal["files"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logger.warning("the journal of an interrupted run cannot be read, its files are made again: %s", error)
            return {}


def partial_path(target: Path) -> Path:
    """Say where a folder is built."""
    target = Path(os.path.realpath(target))
    return target.with_name(f".{target.name}.partial")


@contextmanager
def resume_folder(target: Path, work: str, *, overwrite: bool = False) -> Iterator[PartialFolder]:
    """Build a folder, or continue an interrupted run.

    Args:
        target: The folder to appear when the block ends without an exception; its parents are made.
        work: A text that is the same for the same work: inputs, options, layout.
        overwrite: Replace a folder that has a manifest; otherwise the target must not exist or be empty.

    Yields:
        The folder in the making. When the block ends by an exception, or the process dies, its finished files stay
        in `.NAME.partial` for the next run of the same work.

    Raises:
        StorageError: `target` exists and may not be replaced, or its place cannot be written or is full.
    """
    target = Path(os.path.realpath(target))
    place = partial_path(target)
    make_folder(target.parent)
    clean_stale(target.parent)
    with lock(place):
        folder = PartialFolder(place, work)
        with storing(target):
            refuse_existing(target, overwrite=overwrite)
            folder.resume()
        try:
            with storing(target, only_within=place):
                yield folder
        except StorageError as error:
            if not folder.done:
                raise
            kept = f"the {len(folder.done)} files written so far are kept, run the same command again to go on"
            raise StorageError(error.message, f"{error.hint}; {kept}" if error.hint else kept) from error
        with storing(target):
            stray = sorted(set(files_in(folder.content)) - folder.done.keys())
            if stray:
                message = f"`{folder.content / stray[0]}` was put there by another program"
                raise WeightsError(message, "remove it and run again")
            move_folder(folder.content, target, folder.done, overwrite=overwrite)
            shutil.rmtree(place)
            fsync_folder(target.parent)


# Weight files


def write_safetensors(path: Path, entries: Sequence[Entry], pieces: Pieces) -> FileEntry:
    """Write a safetensors file; return its size and digest."""
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
    return FileEntry(digest.hexdigest(), path.stat().st_size)


def write_torch_archive(path: Path, entries: Sequence[Entry], pieces: Pieces) -> FileEntry:
    """Write an archive as `torch.save` does of a dictionary of tensors; return its size and digest."""
    root = path.name.partition(".")[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, f"{root}/data.pkl", _pickle(entries))
        _add(archive, f"{root}/byteorder", b"little")
        for number, entry in enumerate(entries):
            with _member(archive, f"{root}/data/{number}", entry.num_bytes) as member, _writer() as write:
                for piece in _exactly(entry, pieces):
                    write(partial(member.write, _bytes(piece)))
        _add(archive, f"{root}/version", b"3\n")
    return FileEntry(file_sha256(path), path.stat().st_size)


def _exactly(entry: Entry, pieces: Pieces) -> Iterator[Tensor]:
    """Pass a tensor's pieces on; the file is laid out for just so many elements of one type."""
    count = 0
    for piece in pieces(entry):
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
