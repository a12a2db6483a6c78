"""Writing a language model's folder: weights in files of bounded size, an index, small files; whole, and resumable.

Knows how such folders are laid out; where the numbers come from is the caller's business.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from minigpt4.weights.files.atomic import FileEntry, require_free_space
from minigpt4.weights.files.disk import storing
from minigpt4.weights.files.resumable import partial_path, resume_folder
from minigpt4.weights.files.shard_files import Entry, write_safetensors, write_torch_archive

SHARD_BYTES = 2**30
"""What an interrupted run writes anew at most."""

OTHER_FILES_BYTES = 32 * 2**20
"""Room for the configuration, the tokenizer and the index."""

Format = Literal["safetensors", "bin"]
Report = Callable[[str, int, int], None]
"""Told what is being done, how many bytes of it are done, and of how many."""


def write_model(
    target: Path,
    entries: Sequence[Entry],
    pieces: Callable[[Entry], Iterable[Tensor]],
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
        sources: The files the numbers come from, by what is done with them: an interrupted run is gone on with only
            where they are the same.
        file_format: `safetensors`, or `bin` for archives of torch.
        shard_bytes: Size of a weight file; a larger tensor has a file of its own.
        overwrite: Replace a folder that has a manifest.
        report: Told how far the writing is.

    Returns:
        How many files were there from an interrupted run.

    Raises:
        StorageError: The target exists and may not be replaced, or there is no room for it.
    """
    shards = _shards(entries, file_format, shard_bytes)
    total = sum(entry.num_bytes for entry in entries)
    small = {**small, **_index(shards, file_format, total)}
    require_free_space(target, total + OTHER_FILES_BYTES - _present(partial_path(target)))
    done = 0
    with resume_folder(target, _work(shards, small, sources), overwrite=overwrite) as folder:
        kept = len(folder.done)
        for file, group in shards.items():
            folder.write(file, partial(_write_shard, entries=group, pieces=pieces, file_format=file_format))
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


def _write_shard(
    path: Path, entries: Sequence[Entry], pieces: Callable[[Entry], Iterable[Tensor]], file_format: Format
) -> FileEntry:
    by_name = {entry.name: entry for entry in entries}
    write = write_safetensors if file_format == "safetensors" else write_torch_archive
    return write(path, entries, lambda name: pieces(by_name[name]))


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


def _present(partial: Path) -> int:
    """Count the bytes that an interrupted run left, which will be kept or removed first."""
    if not partial.is_dir():
        return 0
    with storing(partial, doing="read"):
        return sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())


def _work(
    shards: Mapping[str, Sequence[Entry]], small: Mapping[str, bytes], sources: Mapping[str, Sequence[Path]]
) -> str:
    """Describe the work by a digest, so that only the same work is taken up again."""
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
