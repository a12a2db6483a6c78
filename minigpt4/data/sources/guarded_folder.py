"""Reading the files that a list names, without leaving the folder they belong to.

A list of examples comes from anywhere, so a name in it may be `../../etc/passwd`, `/dev/zero`, a link out of the
folder, a named pipe or 100 GB long. Nothing of that is opened.

Knows folders and names; no formats.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from minigpt4.data.sources.faults import (
    ADDRESS,
    LARGE_PICTURE,
    LARGE_TEXT,
    MAX_TEXT_BYTES,
    MISSING_PICTURE,
    NO_PICTURE,
    OUTSIDE,
    WHOLE_PATH,
    WRONG_TEXT,
    BadRecordError,
    checked_text,
)
from minigpt4.errors import DataError
from minigpt4.processing.pictures import DEFAULT_LIMITS

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""What is taken for a picture by its name; what is in it, the opener decides later."""

_MAY_LEAVE = re.compile(r"^/|[\\:]|\.\.")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_picture(name: str) -> bool:
    """Tell whether a file is taken for a picture."""
    return name.lower().endswith(PICTURE_SUFFIXES)


def is_address(name: str) -> bool:
    """Tell whether a name leads into a network: `https://...`, `s3://...`."""
    return bool(_ADDRESS.match(name))


def refuse_address(name: str, key: str) -> None:
    """Refuse a picture that lies in a network.

    Raises:
        BadRecordError: It does.
    """
    if is_address(name):
        raise BadRecordError(
            ADDRESS, f"{key}: {name[:200]!r} is an address, and pictures are read from this machine's disks"
        )


def leaves_folder(name: str) -> bool:
    """Tell whether a name points out of the folder it is relative to, on any system."""
    if not _MAY_LEAVE.search(name):  # nearly every name; lists have millions
        return False
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return bool(posix.is_absolute() or windows.drive or windows.root or ".." in {*posix.parts, *windows.parts})


@dataclass(frozen=True)
class GuardedFolder:
    """A folder of pictures.

    Args:
        path: The folder.
        within: Links may lead anywhere in this folder; left out: in `path` itself. A hub's cache keeps files apart.
    """

    path: Path
    within: Path | None = None

    def read_picture(self, names: Sequence[str], key: str) -> bytes:
        """Return the first of some files that exists; of none in the folder, in the one below it that has pictures.

        Args:
            names: Where it may lie, relative to the folder, the likeliest first.
            key: The record's, for complaints.

        Raises:
            BadRecordError: None exists, or it is empty, too large, no file, or not in the folder.
        """
        for name in names:
            if (path := self._inside(name, key)) is not None:
                return _read(path, key, DEFAULT_LIMITS.max_bytes, LARGE_PICTURE)
        for name in names if self._only_folder else ():
            if (path := self._inside(f"{self._only_folder}/{name}", key)) is not None:
                return _read(path, key, DEFAULT_LIMITS.max_bytes, LARGE_PICTURE)
        shown = names[0] if names else ""
        alike = shown.replace("\\", "/")  # as another system writes it
        other = f", but {alike} is" if alike != shown and self._inside(alike, key) else ""
        raise BadRecordError(MISSING_PICTURE, f"{key}: the picture {shown[:200]!r} is not in {self.path}{other}")

    def read_text(self, name: str, key: str) -> str:
        """Return the caption that a text file holds, without blanks round it.

        Raises:
            BadRecordError: It is missing, blank, too long, no UTF-8, or not in the folder.
        """
        if (path := self._inside(name, key)) is None:
            raise BadRecordError(WRONG_TEXT, f"{key}: the text {name!r} is not in {self.path}")
        data = _read(path, key, MAX_TEXT_BYTES, LARGE_TEXT, may_be_empty=True)
        try:
            return checked_text(data.decode("utf-8-sig").strip(), key)
        except UnicodeDecodeError as error:
            raise BadRecordError(WRONG_TEXT, f"{key}: the text {name!r} is not UTF-8") from error

    @cached_property
    def _only_folder(self) -> str:
        """The one folder that has pictures; empty where several have, or this one."""
        found: set[str] = set()
        try:
            for name, _ in files_in(self.path):
                if is_picture(name):
                    found.add(name.rpartition("/")[0])
                if len(found) > 1 or "" in found:
                    return ""
        except DataError:
            return ""
        return next(iter(found), "")

    def _inside(self, name: str, key: str) -> Path | None:
        """Return the file's real path; None where there is no such file."""
        refuse_address(name, key)
        if leaves_folder(name):
            path = Path(name)
            if ".." not in path.parts and path.is_relative_to(self.path.absolute()):
                raise BadRecordError(
                    WHOLE_PATH, f"{key}: {name[:200]!r} is a whole path, expected one relative to {self.path}"
                )
            raise BadRecordError(OUTSIDE, f"{key}: the picture {name[:200]!r} is outside the folder of the pictures")
        try:
            path = Path(os.path.realpath(self.path / name))
            if not path.exists():
                return None
        except (OSError, ValueError):  # too long a name, a loop of links, a null character
            return None
        if not path.is_relative_to(os.path.realpath(self.within or self.path)):
            raise BadRecordError(OUTSIDE, f"{key}: the picture {name[:200]!r} is a link out of the folder")
        return path


def _read(path: Path, key: str, limit: int, too_large: str, *, may_be_empty: bool = False) -> bytes:
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise BadRecordError(MISSING_PICTURE, f"{key}: {path} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadRecordError(MISSING_PICTURE, f"{key}: {path} is not a file")
        if status.st_size > limit:
            raise BadRecordError(
                too_large, f"{key}: {path.name} has {status.st_size:,} bytes, up to {limit // 1024:,} KiB are read"
            )
        if not status.st_size and not may_be_empty:
            raise BadRecordError(NO_PICTURE, f"{key}: {path.name} is empty")
        parts: list[bytes] = []
        while part := os.read(descriptor, status.st_size - sum(len(known) for known in parts)):
            parts.append(part)
        return b"".join(parts)
    except OSError as error:
        raise BadRecordError(MISSING_PICTURE, f"{key}: {path} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def files_in(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield name (relative, with `/`) and size of every plain file in a folder and its folders, in order of names.

    Hidden files and folders are passed over, and links to folders are not followed.

    Raises:
        DataError: The folder cannot be read.
    """
    waiting = [("", folder)]
    while waiting:
        prefix, path = waiting.pop()
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
            found = [(entry, entry.is_dir(follow_symlinks=False)) for entry in entries if entry.name[0] != "."]
        except OSError as error:
            raise DataError(f"the folder {path} cannot be read: {error.strerror}", "check the path") from error
        waiting += [(f"{prefix}{entry.name}/", Path(entry.path)) for entry, is_folder in reversed(found) if is_folder]
        for entry, is_folder in found:
            try:
                size = entry.stat().st_size if not is_folder and entry.is_file() else None
            except OSError:  # a link that leads in a circle
                size = None
            if size is not None:
                yield prefix + entry.name, size
