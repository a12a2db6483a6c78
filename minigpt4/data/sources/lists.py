"""A source of records that a list names: one line of a file says which picture belongs to which words.

The lists themselves (captions, conversations, questions) are read by their own modules; what they have in common is
here: JSON, the lines, kept as one stretch of bytes, so that a million of them cost what their text costs and processes
that read ahead share them, and the pictures, read from a safe folder when they are asked for.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.data.record import Record
from minigpt4.data.sources.formats import Request
from minigpt4.data.sources.safe_files import (
    LARGE_TEXT,
    MAX_TEXT_BYTES,
    NO_PICTURE,
    BadRecordError,
    SafeFolder,
    text_bytes,
)
from minigpt4.errors import DataError

MAX_LIST_BYTES = 2 * 1024**3
"""Of a JSON list; reading one takes several times its size for a moment."""
MAX_LINE_BYTES = 1024**2
"""Of a line of a JSON Lines file."""
ROWS_PER_REPORT = 10_000

Turns = Sequence[tuple[str, str]]


@dataclass
class Rows:
    """Lines of a list, packed.

    Args:
        report: Called with the number of rows, and that of all: 0 until all are there. Short lists are not reported.
        text: All lines as JSON, one after another.
        ends: Where each ends.
        lengths: Bytes of what each says.
        bad: Numbers of those that are bad as they stand.
        skipped: What was passed over, by kind.
    """

    report: Callable[[int, int], None] | None = None
    text: bytearray = field(default_factory=bytearray)
    ends: "array[int]" = field(default_factory=lambda: array("Q"))
    lengths: "array[int]" = field(default_factory=lambda: array("L"))
    bad: list[int] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

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

    def add_all(self, items: Iterable[tuple[str, Any]], add: Callable[["Rows", str, Any], None]) -> "Rows":
        """Add what `add` makes of each item of a list, and as bad the items that it refuses or that could not be read.

        Args:
            items: Names for people, and contents.
            add: Adds a row to this; may raise a `BadRecordError`.
        """
        for key, item in items:
            try:
                if isinstance(item, BadRecordError):
                    raise item
                add(self, key, item)
            except BadRecordError as error:
                self.add_bad(error)
        return self

    def _append(self, row: list[Any], length: int) -> None:
        self.text += json.dumps(row).encode()
        self.ends.append(len(self.text))
        self.lengths.append(length)
        if self.report is not None and len(self) % ROWS_PER_REPORT == 0:
            self.report(len(self), 0)

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
    pictures: SafeFolder
    rows: Rows
    identity: str

    @property
    def text_lengths(self) -> Sequence[int]:
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

    def barren(self) -> Sequence[str]:
        """Return no group: a list is one, and what is missing of its pictures is not known."""
        return ()

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
        """Return a record, whose picture may be left out.

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


def list_source(request: Request, file: Path, pictures: Path, rows: Rows, sizes: object = ()) -> ListSource:
    """Make a source of rows that have been read.

    Args:
        request: What was asked for.
        file: The list.
        pictures: Where the pictures lie, unless the request says.
        rows: The lines.
        sizes: What else is known of the pictures, for the identity.

    Raises:
        DataError: There is no record at all.
    """
    if not len(rows):
        raise DataError(f"{file} names no records", "add some, or name another file")
    if rows.report is not None and len(rows) >= ROWS_PER_REPORT:
        rows.report(len(rows), len(rows))
    rows.report = None  # rows go to other processes, and who waits does not
    digest = hashlib.sha256(rows.text)
    digest.update(rows.ends.tobytes())
    digest.update(json.dumps(sizes).encode())
    folder = SafeFolder(request.images or pictures, request.within)
    return ListSource(request.name, file.name, folder, rows, digest.hexdigest())


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


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield a name for people and the content of each line; a bad line is a `BadRecordError` in the content's place.

    Raises:
        DataError: The file cannot be read.
    """
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                content: Any
                if not line.endswith(b"\n") and len(line) == MAX_LINE_BYTES:
                    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    content = BadRecordError(LARGE_TEXT, f"{path.name}: line {number} is longer than 1 MiB")
                elif not line.strip():
                    continue
                else:
                    try:
                        content = json.loads(line)
                    except (ValueError, RecursionError):
                        content = BadRecordError("line that is not JSON", f"{path.name}: line {number} is not JSON")
                yield f"{path.name}:{number}", content
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path") from error


def numbered(path: Path, items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield a name for people and the content of each item of a file."""
    return ((f"{path.name}:{number}", item) for number, item in enumerate(items, 1))


def items_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield a name for people and content of each item of a JSON list or JSON Lines file.

    Raises:
        DataError: The file cannot be read, or holds something else than a list.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return read_json_lines(path)
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(f"{path} is not a list", "name the format, or another file")
    return numbered(path, content)


def picture_name(value: object, key: str) -> str:
    """Return the name of a picture that a list gives as text or as a number.

    Raises:
        BadRecordError: It is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise BadRecordError(NO_PICTURE, f"{key} names no picture")
