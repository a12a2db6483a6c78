"""Which records the rows of parquet files make, where that is not one each: lists of captions, and rows that make none.

The captions are read once for it, some rows at a time, and what is kept is where each row's records begin and how long
their texts are: 8 bytes a row and 4 a caption. No picture is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.data.sources.faults import BadRecordError, checked_text, text_bytes
from minigpt4.data.sources.listed import TOLD_EVERY, Count
from minigpt4.data.sources.parquet_files import Columns, RowGroup, damaged, opened
from minigpt4.data.sources.splits import NOT_FETCHED, ROW_LEFT_OUT, is_of_another
from minigpt4.data.sources.tables import captions_in
from minigpt4.errors import DataError

_ROWS_AT_ONCE = 4096
_FETCHED = "success"


@dataclass(frozen=True)
class RowIndex:
    """Which records the rows make.

    Args:
        first: Number of each row's first record, and at the end how many records there are.
        lengths: Bytes of each record's caption, 0 of one that is bad; None where rows have one caption each.
        left_out: How many rows make none, by kind.
    """

    first: np.ndarray
    lengths: np.ndarray | None
    left_out: dict[str, int]

    def __len__(self) -> int:
        """How many records there are."""
        return int(self.first[-1])

    def place(self, number: int) -> tuple[int, int]:
        """Return a record's row, and its place among the records of that row."""
        row = int(np.searchsorted(self.first, number, side="right")) - 1  # behind rows that make none
        return row, number - int(self.first[row])

    def known_bad(self) -> list[int]:
        """Return the numbers of the records without a caption."""
        return [] if self.lengths is None else np.flatnonzero(self.lengths == 0).tolist()

    def together(self) -> Iterator[Sequence[int]]:
        """Yield the numbers of each row's records; those of bad ones by themselves."""
        for row in range(len(self.first) - 1):
            start, end = int(self.first[row]), int(self.first[row + 1])
            sound: list[int] = []
            for number in range(start, end):
                if self.lengths is None or self.lengths[number]:
                    sound.append(number)
                else:
                    yield [number]
            if sound:
                yield sound


def index_rows(
    folder: Path, files: Sequence[str], groups: Sequence[RowGroup], columns: Columns, count: Count | None
) -> RowIndex | None:
    """Find which records the rows make.

    Args:
        folder: Holds the files.
        files: Their names in it.
        groups: Their row groups.
        columns: Their columns.
        count: Told of the rows read.

    Returns:
        None where each row makes one, whatever stands in it.

    Raises:
        DataError: A file is damaged.
    """
    if not columns.listed and columns.split is None and columns.status is None:
        return None
    num_rows = sum(group.rows for group in groups)
    counts = np.ones(num_rows, dtype=np.int64)
    others, failed = np.zeros(num_rows, dtype=bool), np.zeros(num_rows, dtype=bool)
    lengths: list[np.ndarray] = []
    done = 0
    for part in _read(folder, files, groups, columns):
        end = done + part.rows
        if columns.listed:
            counts[done:end] = [len(said) for said in part.captions]
            lengths.append(np.array([_length(caption) for said in part.captions for caption in said], dtype=np.uint32))
        if columns.split is not None:
            others[done:end] = [is_of_another(split) for split in part.splits]
        if columns.status is not None:
            failed[done:end] = [status != _FETCHED for status in part.statuses]
        done = end
        if count is not None and num_rows >= TOLD_EVERY:
            count(done, num_rows)
    if others.all():  # a table for testing alone is what was asked for
        others[:] = False
    return _made(counts, others & ~failed, failed, np.concatenate(lengths) if columns.listed else None)


def _made(counts: np.ndarray, others: np.ndarray, failed: np.ndarray, lengths: np.ndarray | None) -> RowIndex | None:
    left_out = {ROW_LEFT_OUT: int(others.sum()), NOT_FETCHED: int(failed.sum())}
    left_out = {what: number for what, number in left_out.items() if number}
    if left_out:
        none = others | failed
        lengths = None if lengths is None else lengths[~np.repeat(none, counts)]
        counts[none] = 0
    if lengths is None and not left_out:
        return None
    return RowIndex(np.concatenate([[0], np.cumsum(counts)]), lengths, left_out)


@dataclass(frozen=True)
class _Part:
    """Some rows; what is not asked for is empty."""

    rows: int
    captions: list[list[object]]
    splits: list[Any]
    statuses: list[Any]


def _read(folder: Path, files: Sequence[str], groups: Sequence[RowGroup], columns: Columns) -> Iterator[_Part]:
    for number, name in enumerate(files):
        wanted = [group.number for group in groups if group.file == number]
        if not wanted:
            continue
        try:
            with opened(folder / name) as file:
                marks = [name for name in (columns.split, columns.status) if name]
                names = [*(columns.leaves(file) if columns.listed else ()), *marks]
                parts = file.iter_batches(_ROWS_AT_ONCE, row_groups=wanted, columns=names, use_threads=False)
                for part in parts:
                    said = part.column(columns.caption).to_pylist() if columns.listed else []
                    yield _Part(
                        part.num_rows,
                        [captions_in(captions) for captions in said],
                        part.column(columns.split).to_pylist() if columns.split else [],
                        part.column(columns.status).to_pylist() if columns.status else [],
                    )
        except DataError:
            raise
        except (OSError, ValueError, MemoryError) as error:  # the library's own errors are kinds of these
            raise damaged(folder / name, error) from error


def _length(caption: object) -> int:
    try:
        return text_bytes(checked_text(caption, ""))
    except BadRecordError:
        return 0
