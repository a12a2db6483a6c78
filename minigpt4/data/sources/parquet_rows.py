"""What parquet files hold: their row groups, which columns are picture and captions, which records the rows make.

A row makes one record, but for lists of captions and for rows that make none: those of another split, and those whose
picture img2dataset did not fetch. Then the captions are read once, some rows at a time, and what is kept is where each
row's records begin and how long their texts are: 8 bytes a row and 4 a caption. No picture is read for it. Knows
pyarrow, which is optional.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.data.sources.conversations import TURNS
from minigpt4.data.sources.lists import ROWS_PER_REPORT
from minigpt4.data.sources.safe_files import BadRecordError, checked_text, is_other_split, skipped_rows, text_bytes
from minigpt4.data.sources.tables import (
    ADDRESS_COLUMNS,
    FILE_COLUMNS,
    SPLIT,
    TEXT_COLUMNS,
    WORDS,
    addresses_instead,
    captions_in,
)
from minigpt4.errors import DataError

MAX_GROUP_BYTES = 2 * 1024**3
"""Of a row group, unpacked: it is held in memory."""
_IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "picture", "img", "image_bytes", "bytes")
_STATUS, _FETCHED = "status", "success"
_NOT_FETCHED = "row whose picture was not fetched"
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RowGroup:
    """A part of a file that is read at once: numbers of the file and of the group in it, first row, number of rows."""

    file: int
    number: int
    start: int
    rows: int


@dataclass(frozen=True)
class Columns:
    """Columns of a table.

    Args:
        picture: That of the pictures.
        caption: That of the captions.
        words: Where in an object of that column the words lie; None where it holds text.
        listed: It holds lists of captions.
        split: That which says what a row is for, where there is one.
        status: That in which img2dataset says whether it fetched a row's picture, where there is one.
    """

    picture: str
    caption: str
    words: str | None = None
    listed: bool = False
    split: str | None = None
    status: str | None = None

    def leaves(self, file: Any) -> list[str]:  # noqa: ANN401  (pyarrow.parquet.ParquetFile)
        """Return what is read of a file's captions: of objects, the words alone."""
        if self.words is None:
            return [self.caption]
        paths = [file.schema.column(number).path for number in range(len(file.schema))]
        return [path for path in paths if path.startswith(f"{self.caption}.") and path.endswith(f".{self.words}")]


@dataclass(frozen=True)
class RowIndex:
    """Which records the rows make.

    Args:
        count: How many records there are.
        first: Number of each row's first record, and at the end how many records there are; None: each row makes one.
        lengths: Bytes of each record's caption, 0 of one that is bad; None where rows have one caption each.
        left_out: How many rows make none, by kind.
    """

    count: int
    first: np.ndarray | None = None
    lengths: np.ndarray | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.count

    def place(self, number: int) -> tuple[int, int]:
        """Return a record's row, and its place among the records of that row."""
        if self.first is None:
            return number, 0
        row = int(np.searchsorted(self.first, number, side="right")) - 1  # behind rows that make none
        return row, number - int(self.first[row])

    def known_bad(self) -> list[int]:
        """Return the numbers of the records without a caption."""
        return [] if self.lengths is None else np.flatnonzero(self.lengths == 0).tolist()

    def together(self) -> Iterator[Sequence[int]]:
        """Yield the numbers of each row's records; those of bad ones by themselves."""
        if self.first is None or self.lengths is None:
            return
        for start, end in zip(self.first[:-1].tolist(), self.first[1:].tolist(), strict=True):
            bad = [number for number in range(start, end) if not self.lengths[number]]
            yield from ([number] for number in bad)
            if len(bad) < end - start:
                yield [number for number in range(start, end) if self.lengths[number]]


@contextmanager
def opened(path: Path) -> Iterator[Any]:  # a pyarrow.parquet.ParquetFile
    """Open a file for a while.

    Raises:
        DataError: pyarrow is not installed; the file cannot be read or is damaged, which may show while it is open.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError("parquet files need pyarrow", 'pip install "minigpt4[data]"') from error
    try:
        with ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            yield file
    except (OSError, ValueError, MemoryError) as error:  # the library's own errors are kinds of these
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(f"{path} is not a parquet file, or it is damaged: {reason}", "fetch it again") from error


def describe_files(folder: Path, files: Sequence[str], text: str | None) -> tuple[Columns, tuple[RowGroup, ...]]:
    """Read the ends of files that follow each other.

    Args:
        folder: Holds them.
        files: Their names in it, one at least.
        text: The caption's column, where it was named.

    Returns:
        Their columns, which are the same in all, and their row groups that have rows.

    Raises:
        DataError: pyarrow is not installed, a file is damaged, has no such columns or others than those before it.
    """
    groups: list[RowGroup] = []
    found: list[Columns] = []
    start = 0
    for number, name in enumerate(files):
        path = folder / name
        with opened(path) as file:
            found.append(_choose_columns(file.schema_arrow, path, text))
            sizes = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in sizes]
        if found[-1] != found[0]:
            there, before = (f"{c.picture}, {c.caption}{' (lists)' * c.listed}" for c in (found[-1], found[0]))
            raise DataError(
                f"{path} has the columns {there}, the files before it {before}",
                "put files with other columns in a folder of their own, as one source more",
            )
        for group, (rows, size) in enumerate(sizes):
            if size > MAX_GROUP_BYTES:
                raise DataError(
                    f"{path}: row group {group} has {size:,} bytes, up to 2 GiB are read", "write smaller ones"
                )
            if rows > 0:
                groups.append(RowGroup(number, group, start, rows))
                start += rows
    return found[0], tuple(groups)


def index_rows(
    folder: Path,
    files: Sequence[str],
    groups: Sequence[RowGroup],
    columns: Columns,
    count: Callable[[int, int], None] | None,
) -> RowIndex:
    """Find which records the rows make.

    Args:
        folder: Holds the files.
        files: Their names in it.
        groups: Their row groups.
        columns: Their columns.
        count: Called with the number of rows read, and of all.

    Raises:
        DataError: A file is damaged.
    """
    num_rows = sum(group.rows for group in groups)
    if not columns.listed and columns.split is None and columns.status is None:
        return RowIndex(num_rows)
    counts = np.ones(num_rows, dtype=np.int64)
    others, failed = np.zeros(num_rows, dtype=bool), np.zeros(num_rows, dtype=bool)
    lengths: list[np.ndarray] = []
    done = 0
    for part in _parts(folder, files, groups, columns):
        end = done + part.num_rows
        if columns.listed:
            said = [captions_in(captions) for captions in part.column(columns.caption).to_pylist()]
            counts[done:end] = [len(captions) for captions in said]
            lengths.append(np.array([_length(caption) for captions in said for caption in captions], dtype=np.uint32))
        if columns.split is not None:
            others[done:end] = [is_other_split(split) for split in part.column(columns.split).to_pylist()]
        if columns.status is not None:
            failed[done:end] = [status != _FETCHED for status in part.column(columns.status).to_pylist()]
        done = end
        if count is not None and num_rows >= ROWS_PER_REPORT:
            count(done, num_rows)
    if others.all():  # a table for testing alone is what was asked for
        others[:] = False
    left_out = skipped_rows(int((others & ~failed).sum())) | ({_NOT_FETCHED: int(failed.sum())} if failed.any() else {})
    known = np.concatenate(lengths) if columns.listed else None
    if known is None and not left_out:
        return RowIndex(num_rows)
    none = others | failed
    known = None if known is None else known[~np.repeat(none, counts)]
    counts[none] = 0
    return RowIndex(int(counts.sum()), np.concatenate([[0], np.cumsum(counts)]), known, left_out)


def _parts(folder: Path, files: Sequence[str], groups: Sequence[RowGroup], columns: Columns) -> Iterator[Any]:
    """Yield some rows after others, of the columns that say which records they make (pyarrow.RecordBatch)."""
    for number, name in enumerate(files):
        wanted = [group.number for group in groups if group.file == number]
        with opened(folder / name) as file:
            marks = [name for name in (columns.split, columns.status) if name]
            names = [*(columns.leaves(file) if columns.listed else ()), *marks]
            yield from file.iter_batches(_ROWS_AT_ONCE, row_groups=wanted, columns=names, use_threads=False)


def _length(caption: object) -> int:
    try:
        return text_bytes(checked_text(caption, ""))
    except BadRecordError:
        return 0


def _choose_columns(schema: Any, path: Path, text: str | None) -> Columns:  # noqa: ANN401  (of pyarrow)
    """Find the columns of picture and captions.

    Raises:
        DataError: One is not there, or of another kind.
    """
    there = {name.lower(): name for name in schema.names}

    def first(names: Iterable[str]) -> str | None:
        return next((there[name] for name in names if name in there), None)

    image, caption = first((*_IMAGE_COLUMNS, *FILE_COLUMNS)), first([text.lower()] if text else TEXT_COLUMNS)
    if image is None and first(ADDRESS_COLUMNS):
        raise addresses_instead(path)
    if caption is None and not text and (talk := first(("question", *TURNS, "texts"))):
        raise DataError(
            f"{path} has questions or conversations (column {talk}), and of parquet files captions are read",
            "write its pictures into a folder and the words as a list, LLaVA's for one: docs/training.md",
        )
    if image is None or caption is None:
        what = "picture, expected image" if image is None else f"caption, expected {text or ' or '.join(TEXT_COLUMNS)}"
        raise DataError(
            f"{path} has no column for the {what}, but it has {', '.join(schema.names)[:200]}",
            "rename a column, or name the caption's with `text`",
        )
    if twice := next((name for name in (image, caption) if schema.names.count(name) > 1), None):
        raise DataError(f"{path} has more than one column {twice}", "rename those that are not meant")
    if not _is_picture(schema.field(image).type):
        raise DataError(
            f"{path}: column {image} is {str(schema.field(image).type)[:200]}, expected bytes, a file name, or "
            "{bytes, path}",
            "write the pictures' files, as they are on disk, into it",
        )
    kind, listed = _listed(schema.field(caption).type)
    words = None if _is_text(kind) else next((name for name in WORDS if name in _fields(kind)), None)
    if words is None and not _is_text(kind):
        raise DataError(
            f"{path}: column {caption} is {str(schema.field(caption).type)[:200]}, expected text or lists of text",
            "name another column with `text`",
        )
    marks = [first([name]) for name in (SPLIT, _STATUS)]
    split, status = (name if name is not None and _is_text(schema.field(name).type) else None for name in marks)
    return Columns(image, caption, words, listed, split, status if "error_message" in there else None)


def _is_text(kind: Any) -> bool:  # noqa: ANN401  (a type of pyarrow)
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):  # the same text many times, as table libraries write categories
        kind = kind.value_type
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind))


def _is_picture(kind: Any) -> bool:  # noqa: ANN401  (a type of pyarrow)
    import pyarrow.types as kinds

    fields = {field.name for field in kind} if kinds.is_struct(kind) else set()
    return bool(_is_text(kind) or kinds.is_binary(kind) or kinds.is_large_binary(kind) or fields & {"bytes", "path"})


def _listed(kind: Any) -> tuple[Any, bool]:  # noqa: ANN401  (a type of pyarrow)
    """Return the type of a list's items, or one that is no list as it is, and whether it is a list."""
    import pyarrow.types as kinds

    listed = bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))
    return (kind.value_type if listed else kind), listed


def _fields(kind: Any) -> set[str]:  # noqa: ANN401  (a type of pyarrow)
    """Return the names of the fields of an object that hold text."""
    import pyarrow.types as kinds

    return {field.name for field in kind if _is_text(field.type)} if kinds.is_struct(kind) else set()
