"""The one writer: whatever must survive a crash goes to disk through here, whole or not at all.

New content is built in a scratch folder beside its destination, brought to the disk (fsync), described by a manifest
(sha256 and size of every file, written last), and moved into place by one rename.

What a crash (power, kill -9) leaves at the destination:

- new file, new folder, replaced file: what was there before, or the new content; nothing else.
- replaced folder, which takes two renames: before the first the old folder; between the two no folder, and the old one
  beside it as `.NAME.previous`; after the second the new folder. `recover` puts `.NAME.previous` back, or removes it
  when the new folder is in place; `verify_folder` and the next writer call it.

A reader that opens file after file while the folder is replaced may see files of both: load a folder in one go, or
write each version to a name of its own. This module knows nothing of tensors or models.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, overload

from minigpt4.errors import StorageError, WeightsError
from minigpt4.weights.files.disk import (
    fsync,
    fsync_folder,
    lock,
    make_folder,
    new_scratch,
    remove_scratch,
    scratch_folder,
    scratch_path,
    storing,
)

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 16 * 1024**2

_LEFT = re.compile(r"\.(?P<name>.+)\.(minigpt4-tmp(\.lock)?|previous)")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says about one file: sha256 (64 hexadecimal digits) and length in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Args:
        files: An entry for every file but the manifest itself, by its path in the folder with `/`, sorted.
        format_version: Version of the manifest's own format.
    """

    files: dict[str, FileEntry]
    format_version: int = FORMAT_VERSION


@contextmanager
def write_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder whole or not at all.

    Args:
        target: The folder to appear when the block ends without an exception; its parents are made.
        overwrite: Replace a folder that this function wrote before. Any other non-empty folder is refused.

    Yields:
        An empty folder on the same file system; what lies in it when the block ends becomes `target`.

    Raises:
        StorageError: `target` exists and may not be replaced, or its place cannot be written or is full. The target
            is untouched, unless only the very last flush failed: then it is new and complete.
        WeightsError: The block left something other than files and folders.
    """
    target = Path(os.path.realpath(target))
    make_folder(target.parent)
    clean_stale(target.parent)
    with scratch_folder(target.parent, target.name) as scratch:
        new = scratch / target.name
        with storing(target):
            _recover_locked(target, scratch)
            refuse_existing(target, overwrite=overwrite)
            new.mkdir()
        with storing(target, only_within=scratch):
            yield new
        with storing(target):
            write_manifest(new)
            _move_in(new, target, scratch, overwrite=overwrite)


@overload
def write_file(target: Path, mode: Literal["wb"] = "wb") -> AbstractContextManager[IO[bytes]]: ...
@overload
def write_file(target: Path, mode: Literal["w"]) -> AbstractContextManager[IO[str]]: ...
@contextmanager
def write_file(target: Path, mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    r"""Write or replace one file whole or not at all.

    Args:
        target: The file to appear, or to be replaced, when the block ends without an exception; its parents are made.
        mode: `wb` for bytes, `w` for text (UTF-8, lines end with `\n`).

    Yields:
        The open file.

    Raises:
        StorageError: The place cannot be written or is full, or `target` is a folder.
    """
    target = Path(os.path.realpath(target))
    make_folder(target.parent)
    clean_stale(target.parent)
    with scratch_folder(target.parent, target.name) as scratch:
        new = scratch / target.name
        text = {} if mode == "wb" else {"encoding": "utf-8", "newline": "\n"}
        with storing(target, only_within=scratch), new.open(mode, **text) as file:  # type: ignore[call-overload]
            yield file
        with storing(target):
            fsync(new)
            os.replace(new, target)
            fsync_folder(target.parent)


def verify_folder(path: Path, *, deep: bool = True) -> Manifest:
    """Check that a folder holds exactly what its manifest says.

    Files whose own name begins with a dot are not counted as extra: file browsers and hubs drop them anywhere.

    Args:
        path: A folder made by `write_folder`.
        deep: Read every file and compare its sha256; otherwise compare names and sizes only.

    Returns:
        The manifest.

    Raises:
        WeightsError: The folder or its manifest is missing or no manifest at all; a file is missing, extra, of
            another size or of another content.
        StorageError: The folder cannot be read.
    """
    with storing(path, doing="read"):
        if not path.is_dir():
            recover(path)
        if not path.is_dir():
            raise WeightsError(f"`{path}` is not a folder", "check the path")
        manifest = _read_manifest(path)
        present = set(files_in(path)) - {MANIFEST_NAME}
        for name in manifest.files:
            if name not in present:
                raise _damaged(f"`{path / name}` is missing, the folder's manifest lists it")
        for name in sorted(present - manifest.files.keys()):
            if not PurePosixPath(name).name.startswith("."):
                hint = "move it elsewhere, or write the folder anew"
                raise WeightsError(f"`{path / name}` is not listed in the folder's manifest", hint)
        for name, entry in manifest.files.items():
            _check_file(path / name, entry, deep=deep)
    return manifest


def move_folder(new: Path, target: Path, known: Mapping[str, FileEntry], *, overwrite: bool = False) -> None:
    """Write the manifest of a finished folder and move it to `target`.

    Args:
        new: The folder, on the same file system.
        target: Where it goes.
        known: What is known of its files already, by name: they are on the disk and are not read again.
        overwrite: Replace a folder that has a manifest; otherwise `target` must not exist or be empty.

    Raises:
        StorageError: `target` exists and may not be replaced.
        WeightsError: The folder holds something other than files and folders.
        OSError: It cannot be written.
    """
    write_manifest(new, known)
    with scratch_folder(target.parent, target.name) as scratch:
        _move_in(new, target, scratch, overwrite=overwrite)


def recover(target: Path) -> None:
    """Undo or finish a replacement of the folder `target` that a crash interrupted; else do nothing.

    Raises:
        StorageError: The place cannot be written.
    """
    target = Path(os.path.realpath(target))
    with storing(target):
        if _was_interrupted(target):
            with scratch_folder(target.parent, target.name) as scratch:
                _recover_locked(target, scratch)


def clean_stale(parent: Path) -> None:
    """Remove from `parent` what dead writers left there, and recover interrupted replacements.

    What living processes are at stays, as does what other users left, and all on a file system without locks.

    Raises:
        StorageError: `parent` cannot be read.
    """
    with storing(parent, doing="read"):
        names = {found["name"] for entry in os.listdir(parent) if (found := _LEFT.fullmatch(entry))}
    for name in sorted(names):
        try:
            with lock(scratch_path(parent, name), wait=False) as held, storing(parent / name):
                if held:
                    scratch = new_scratch(parent, name)
                    _recover_locked(parent / name, scratch)
                    remove_scratch(scratch)
        except StorageError as error:
            logger.warning("what a dead process left of %s stays: %s", parent / name, error)  # another user's


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists and may not be replaced.

    Raises:
        StorageError: `target` is a file, or a folder that is not empty; with `overwrite`, one without a manifest.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise StorageError(f"`{target}` is a file, a folder is to be written there", "choose another place")
    if not os.listdir(target):
        return
    if not overwrite:
        raise StorageError(f"`{target}` exists already", "choose another place, or remove it first")
    if not (target / MANIFEST_NAME).is_file():
        message = f"`{target}` has no `{MANIFEST_NAME}`, only a folder that has one is replaced"
        raise StorageError(message, "choose another place, or remove it yourself")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content as 64 hexadecimal digits, read in bounded chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(folder: Path) -> list[str]:
    """List everything that is no folder, at any depth, by its path with `/`, sorted."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _previous(target: Path) -> Path:
    """Where the old folder waits between the two renames of a replacement."""
    return target.with_name(f".{target.name}.previous")


def _was_interrupted(target: Path) -> bool:
    """Whether the old folder of a replacement is still there; only a folder with a manifest is ever replaced."""
    return (_previous(target) / MANIFEST_NAME).is_file()


def _move_in(new: Path, target: Path, scratch: Path, *, overwrite: bool) -> None:
    """Rename `new` to `target`; the caller holds the lock."""
    _recover_locked(target, scratch)
    refuse_existing(target, overwrite=overwrite)
    previous = _previous(target)
    replaces = target.is_dir() and bool(os.listdir(target))
    if replaces:
        os.rename(target, previous)
    try:
        os.rename(new, target)
    except BaseException:
        if replaces:
            os.rename(previous, target)
        raise
    fsync_folder(target.parent)
    if replaces:
        _discard(previous, scratch)


def _recover_locked(target: Path, scratch: Path) -> None:
    if not _was_interrupted(target):
        return
    if os.path.lexists(target):
        _discard(_previous(target), scratch)
    else:
        logger.warning("an interrupted replacement of %s is undone", target)
        os.rename(_previous(target), target)
        fsync_folder(target.parent)


def _discard(previous: Path, scratch: Path) -> None:
    """Leave a replaced folder to the removal of `scratch`: half removed, it must not bear the name `recover` wants."""
    os.rename(previous, scratch / previous.name)


def write_manifest(folder: Path, known: Mapping[str, FileEntry] | None = None) -> None:
    """Bring every file and folder to the disk, then the manifest; files in `known` are there already."""
    files = dict(known or {})
    for name in files_in(folder):
        path = folder / name
        if name in files or name == MANIFEST_NAME:
            continue
        if path.is_symlink() or not path.is_file():
            message = f"`{name}` is not a plain file, a folder to be written holds files and folders only"
            raise WeightsError(message, "write its content instead")
        fsync(path)
        files[name] = FileEntry(file_sha256(path), path.stat().st_size)
    for path in folder.rglob("*/"):
        fsync_folder(path)
    text = json.dumps(asdict(Manifest(files)), indent=2, sort_keys=True) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8", newline="\n")
    fsync(folder / MANIFEST_NAME)
    fsync_folder(folder)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise WeightsError(f"`{folder}` has no `{MANIFEST_NAME}`", "point to a folder that minigpt4 has written")
    if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
        raise _damaged(f"`{path}` is {size} bytes, at most {MAX_MANIFEST_BYTES} were expected")
    try:
        content = json.loads(path.read_bytes())
        version = content["format_version"]
        files = {name: FileEntry(**entry) for name, entry in sorted(content["files"].items())}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(f"`{path}` is not a manifest") from error
    if version != FORMAT_VERSION:
        message = f"`{path}` has format version {version!r}, {FORMAT_VERSION} was expected"
        raise WeightsError(message, "upgrade minigpt4")
    for name, entry in files.items():
        leads_out = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
        if leads_out or not isinstance(entry.size, int) or not re.fullmatch("[0-9a-f]{64}", str(entry.sha256)):
            raise _damaged(f"`{path}` has a bad entry for {name!r}")
    return Manifest(files, version)


def _check_file(path: Path, entry: FileEntry, *, deep: bool) -> None:
    if (size := path.stat().st_size) != entry.size:
        raise _damaged(f"`{path}` is {size} bytes, the folder's manifest says {entry.size}")
    if deep and (digest := file_sha256(path)) != entry.sha256:
        raise _damaged(f"`{path}` has sha256 {digest[:16]}..., the folder's manifest says {entry.sha256[:16]}...")


def _damaged(message: str) -> WeightsError:
    return WeightsError(message, "the folder is damaged or was changed: fetch, copy or write it anew")
