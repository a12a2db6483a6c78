"""A source of records that a list names: one line of a file says which picture belongs to which words.

The lists themselves (captions, conversations, questions) are read by their own modules; what they have in common is
here: the lines, kept as one stretch of bytes, so that a million of them cost what their text costs and processes that
read ahead share them, and the pictures, read from a guarded folder when they are asked for.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.data.record import Record
from minigpt4.data.sources.faults import LARGE_TEXT, MAX_TEXT_BYTES, BadRecordError, text_bytes
from minigpt4.data.sources.guarded_folder import GuardedFolder
from minigpt4.errors import DataError

MAX_LIST_BYTES = 2 * 1024**3
"""Of a JSON list; reading one takes several times its size for a moment."""
MAX_LINE_BYTES = 1024**2
"""Of a line of a JSON Lines file."""

TOLD_EVERY = 10_000
"""Rows after which whoever waits for a list is told."""

Turns = Sequence[tuple[str, str]]
Count = Callable[[int, int], None]
"""Told how many rows were read, and of how many: 0 while nobody knows."""


@dataclass
class Rows:
    """Lines of a list, packed.

    Args:
        text: All lines as JSON, one after another.
        ends: Where each ends.
        lengths: Bytes of what each says.
        bad: Numbers of those that are bad as they stand.
        skipped: What was passed over, by kind.
        count: Told of the rows until all are there.
    """

    text: bytearray = field(default_factory=bytearray)
    ends: "array[int]" = field(default_factory=lambda: array("Q"))
    lengths: "array[int]" = field(default_factory=lambda: array("L"))
    bad: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    count: Count | None = None

    def add(self, key: str, pictures: Sequence[str] | None, turns: Turns) -> None:
        """Add a record.

        Args:
            key: Names it for people.
            pictures: Where its picture may lie, the likeliest first; None for text alone.
            turns: Its questions and answers, checked.
        """
        length = sum(text_bytes(question) + text_bytes(answer) for question, answer in turns)
        if length > MAX_TEXT_BYTES:
            message = f"{key}: its turns have {length:,} bytes, up to {MAX_TEXT_BYTES // 1024} KiB are read"
            self.add_bad(BadRecordError(LARGE_TEXT, message))
        else:
            self._append([key, pictures, turns], length)

    def add_sidecar(self, key: str, picture: str, text: str, length: int) -> None:
        """Add a record whose caption is a file of its own."""
        self._append([key, [picture], text], length)

    def add_bad(self, error: BadRecordError) -> None:
        """Add a record that is bad as it stands."""
        self.bad.append(len(self.ends))
        self._append([error.kind, error.message], 0)

    def _append(self, row: list[Any], length: int) -> None:
        self.text += json.dumps(row).encode()
        self.ends.append(len(self.text))
        self.lengths.append(length)
        if self.count is not None and len(self) % TOLD_EVERY == 0:
            self.count(len(self), 0)

    def all_there(self) -> None:
        """Tell that no row follows, if anything was told."""
        if self.count is not None and len(self) >= TOLD_EVERY:
            self.count(len(self), len(self))
        self.count = None  # rows go to other processes, and who waits does not

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> list[Any]:
        row: list[Any] = json.loads(self.text[self.ends[number - 1] if number else 0 : self.ends[number]])
        return row


@dataclass(frozen=True)
class ListSource:
    """Records that a list names.

    Args:
        name: What a person calls it.
        file: The list, or the folder that stands for one.
        pictures: Where the pictures lie.
        rows: The list's lines.
        identity: A digest of what the list says.
    """

    name: str
    file: str
    pictures: GuardedFolder
    rows: Rows
    identity: str

    @property
    def text_lengths(self) -> Sequence[int] | None:
        """Bytes of what is said in each record."""
        return self.rows.lengths

    @property
    def skipped(self) -> dict[str, int]:
        """What was passed over, by kind."""
        return dict(self.rows.skipped)

    def __len__(self) -> int:
        return len(self.rows)

    def group(self, number: int) -> str:
        """Return the name of the list; all its records came in it."""
        return self.file

    def known_bad(self) -> list[int]:
        """Return the numbers of the records that are bad without being read."""
        return self.rows.bad

    def together(self) -> Iterable[Sequence[int]]:
        """Return the numbers of the records of each picture; those of bad ones, and of text alone, by themselves."""
        found: dict[str | int, list[int]] = {}
        for number in range(len(self)):
            row = self.rows[number]
            pictures = row[1] if len(row) > 2 else None
            found.setdefault(pictures[0] if pictures else number, []).append(number)
        return found.values()

    def read(self, number: int, *, with_picture: bool = True) -> Record:
        """Return a record.

        Args:
            number: Which.
            with_picture: Read its picture; else it has none.

        Raises:
            BadRecordError: It is bad as it stands, or its picture cannot be had.
        """
        if not 0 <= number < len(self):
            raise DataError(f"{self.name} has no record {number}, it has {len(self):,}")
        row = self.rows[number]
        if len(row) == 2:
            raise BadRecordError(*row)
        key, pictures, turns = row
        if isinstance(turns, str):
            turns = [("", self.pictures.read_text(turns, key))]
        picture = None if pictures is None or not with_picture else self.pictures.read_picture(pictures, key)
        return Record(key, picture, tuple((question, answer) for question, answer in turns))


def list_source(name: str, file: Path, pictures: GuardedFolder, rows: Rows, sizes: object = ()) -> ListSource:
    """Make a source of rows that have been read.

    Args:
        name: What a person calls it.
        file: The list.
        pictures: Where the pictures lie.
        rows: The lines.
        sizes: What else is known of the pictures, for the identity.

    Raises:
        DataError: There is no record at all.
    """
    if not len(rows):
        raise DataError(f"{file} names no records", "add some, or name another file")
    rows.all_there()
    digest = hashlib.sha256(rows.text)
    digest.update(rows.ends.tobytes())
    digest.update(json.dumps(sizes).encode())
    return ListSource(name, file.name, pictures, rows, digest.hexdigest())


def read_json_pairs(path: Path) -> list[tuple[str, Any]]:
    """Read a JSON file that holds an object, as its keys and values: a key that stands there twice is there twice.

    Raises:
        DataError: As for `read_json`.
    """
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        outermost[:] = pairs  # the last object that ends is the one round all others
        return dict(pairs)

    read_json(path, keep)
    return outermost


def read_json(path: Path, as_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:  # noqa: ANN401  (whatever a file holds)
    """Read a JSON file whole.

    Args:
        path: The file.
        as_object: Makes an object of its keys and values; left out: a dict.

    Raises:
        DataError: It cannot be read, is larger than `MAX_LIST_BYTES`, nested too deep or not JSON.
    """
    try:
        if (size := path.stat().st_size) > MAX_LIST_BYTES:
            raise DataError(
                f"{path} has {size:,} bytes, up to {MAX_LIST_BYTES // 1024**3} GiB are read",
                "split it, and name the parts as sources of their own; or write shards or parquet",
            )
        return json.loads(path.read_bytes(), object_pairs_hook=as_object)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deep for JSON of this kind", "write it as a plain list") from error
    except ValueError as error:
        hint = "mend or fetch the file"
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            hint = "if each of its lines is JSON of its own, name the file .jsonl; else mend it"
        raise DataError(f"{path} is not JSON: {' '.join(str(error).split())[:200]}", hint) from error


def read_json_lines(path: Path) -> Iterable[tuple[int, Any]]:
    """Yield line number and content of a JSON Lines file; a bad line is a `BadRecordError` in the content's place.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
                    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    yield number, BadRecordError(LARGE_TEXT, f"{path.name}: line {number} is longer than 1 MiB")
                elif line.strip():
                    yield number, _line(line, path.name, number)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path") from error


def _line(line: bytes, name: str, number: int) -> Any:  # noqa: ANN401  (whatever a line holds)
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return BadRecordError("line that is not JSON", f"{name}: line {number} is not JSON")


def items_of(path: Path) -> Iterable[tuple[str, Any]]:
    """Yield a name for people and content of each item of a JSON list or JSON Lines file.

    Raises:
        DataError: The file cannot be read, or holds something else than a list.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return ((f"{path.name}:{number}", item) for number, item in read_json_lines(path))
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path} is not a list", "name the format, or another file")
    return ((f"{path.name}:{number}", item) for number, item in enumerate(content, 1))


def picture_name(value: object, key: str) -> str:
    """Return the name of a picture that a list gives as text or as a number.

    Raises:
        BadRecordError: It is nothing of both.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise BadRecordError("no picture", f"{key} names no picture")
