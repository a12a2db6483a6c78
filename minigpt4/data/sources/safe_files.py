"""Files that a data set names, read without harm, and what makes one of its records bad.

A data set comes from anywhere, so a name in it may be `../../etc/passwd`, `/dev/zero`, a link out of its folder, a
named pipe or 100 GB long. Nothing of that is opened: the record that names it is bad, and counted by a kind. Which
files and rows belong to another split is decided here too. Knows no format.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from minigpt4.errors import DataError, ImageError, MiniGPT4Error, PromptError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
"""What is taken for a picture by its name; what is in it, the opener decides later."""
MAX_TEXT_BYTES = 256 * 1024
"""Of all that is said about one picture; a model's context ends long before."""

NO_PICTURE = "no picture"
NO_TEXT = "no text"
MISSING_PICTURE = "picture that is missing"
OUTSIDE = "picture outside its folder"
WHOLE_PATH = "picture named by its whole path"
ADDRESS = "picture named by its address"
LARGE_PICTURE = "picture that is too large"
LARGE_TEXT = "text that is too long"
WRONG_TEXT = "text of another kind"
DOUBLED = "name that stands twice"
DAMAGED = "damaged file"
UNREADABLE = "picture that cannot be opened"
NO_PROMPT = "text that cannot be a prompt"
OTHER = "record that cannot be used"

_ROW_LEFT_OUT = "row of another split"
_FILE_LEFT_OUT = "file of another split"
_OTHER_SPLIT = re.compile(r"(^|[/_.-])(test|val|valid|validation|dev)\d*([/_.-]|$)")
_MAY_LEAVE = re.compile(r"^/|[\\:]|\.\.")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class BadRecordError(DataError):
    """A record that nothing can be learnt from.

    Args:
        kind: A few words to count by, one of this module's.
        message: One sentence that names the record.
        hint: The cure.
    """

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep kind and hint when the error crosses a process border."""
        return type(self), (self.kind, self.message, self.hint)


def kind_of(error: MiniGPT4Error) -> str:
    """Return the kind of what was wrong with a record, from whichever error it became."""
    if isinstance(error, BadRecordError):
        return error.kind
    if isinstance(error, PromptError):
        return NO_PROMPT
    return UNREADABLE if isinstance(error, ImageError) else OTHER


def text_bytes(text: str) -> int:
    """Return the length of a text in UTF-8; half a character, which JSON can hold, counts three bytes."""
    return len(text.encode("utf-8", "surrogatepass"))


def checked_text(value: object, key: str, what: str = "caption") -> str:
    """Return a text that something can be learnt from, as it is: control characters and `</s>` are ordinary text.

    Args:
        value: What a file holds in a text's place.
        key: The record's, for the complaint.
        what: The text's name, for the complaint.

    Raises:
        BadRecordError: Missing, blank, not a text, or longer than `MAX_TEXT_BYTES`.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRecordError(NO_TEXT, f"{key} has no {what}")
    if not isinstance(value, str):
        kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
        kind = kinds.get(type(value), type(value).__name__)
        raise BadRecordError(WRONG_TEXT, f"{key}: the {what} is {kind}, expected text")
    if len(value) > MAX_TEXT_BYTES or text_bytes(value) > MAX_TEXT_BYTES:
        raise BadRecordError(
            LARGE_TEXT, f"{key}: the {what} has {len(value):,} characters, up to {MAX_TEXT_BYTES // 1024} KiB are read"
        )
    return value


def decoded_text(data: bytes, key: str, what: str = "caption") -> str:
    """Return the text that a file of its own holds, without blanks round it.

    Raises:
        BadRecordError: It is not UTF-8, or nothing can be learnt from it.
    """
    try:
        return checked_text(data.decode("utf-8-sig").strip(), key)
    except UnicodeDecodeError as error:
        raise BadRecordError(WRONG_TEXT, f"{key}: the {what} is not UTF-8") from error


def files_of_split(names: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """Choose the files to learn from: not those named for testing, unless every name says so.

    Args:
        names: Relative to the folder that a person named, so that its own name does not count.

    Returns:
        The names chosen, and how many others there are, by kind.
    """
    chosen = [name for name in names if not is_other_split(name, anywhere=True)] or list(names)
    return chosen, skipped_rows(0, len(names) - len(chosen))


def is_other_split(name: object, *, anywhere: bool = False) -> bool:
    """Return whether a row's `split`, or with `anywhere` the name of a file, says that it is for testing."""
    look = _OTHER_SPLIT.search if anywhere else _OTHER_SPLIT.match
    return isinstance(name, str) and bool(look(name.strip().lower()))


def skipped_rows(rows: int, files: int = 0) -> dict[str, int]:
    """Return the numbers of rows and files of another split, by kind, where there are any."""
    return {kind: count for kind, count in ((_FILE_LEFT_OUT, files), (_ROW_LEFT_OUT, rows)) if count}


def is_picture(name: str) -> bool:
    """Return whether a file is taken for a picture."""
    return name.lower().endswith(PICTURE_SUFFIXES)


def is_address(name: str) -> bool:
    """Return whether a name leads into a network: `https://...`, `s3://...`."""
    return bool(_ADDRESS.match(name))


def refuse_address(name: str, key: str) -> None:
    """Raise a `BadRecordError` if a picture is named by its address in a network."""
    if is_address(name):
        raise BadRecordError(
            ADDRESS, f"{key}: {name[:200]!r} is an address, and pictures are read from this machine's disks"
        )


def leaves_folder(name: str) -> bool:
    """Return whether a name points out of the folder it is relative to, on any system."""
    if not _MAY_LEAVE.search(name):  # nearly every name; lists have millions
        return False
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    return bool(posix.is_absolute() or windows.drive or windows.root or ".." in {*posix.parts, *windows.parts})


@dataclass(frozen=True)
class SafeFolder:
    """A folder of pictures and texts, of which nothing outside is read.

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
        from minigpt4.processing.pictures import DEFAULT_LIMITS  # with Pillow: `--help` imports this module

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
        return decoded_text(_read(path, key, MAX_TEXT_BYTES, LARGE_TEXT, may_be_empty=True), key, f"text {name!r}")

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
    if not path.is_file():
        raise BadRecordError(MISSING_PICTURE, f"{key}: {path} is not a file")
    try:
        # Without O_NONBLOCK, opening a named pipe that has just taken the file's place would wait for a writer.
        with open(path, "rb", opener=_without_waiting) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise BadRecordError(
                    too_large, f"{key}: {path.name} has {size:,} bytes, up to {limit // 1024:,} KiB are read"
                )
            if not size and not may_be_empty:
                raise BadRecordError(NO_PICTURE, f"{key}: {path.name} is empty")
            return file.read(size)
    except OSError as error:
        raise BadRecordError(MISSING_PICTURE, f"{key}: {path} cannot be read: {error.strerror}") from error


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


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
