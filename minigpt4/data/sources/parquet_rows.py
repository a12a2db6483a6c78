"""Which records the rows of parquet files make, where that is not one each: lists of captions, rows for testing.

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
from minigpt4.data.sources.splits import is_of_another
from minigpt4.data.sources.tables import captions_in
from minigpt4.errors import DataError

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RowIndex:
    """Which records the rows make.

    Args:
        first: Number of each row's first record, and at the end how many records there are.
        lengths: Bytes of each record's caption, 0 of one that is bad; None where rows have one caption each.
        left_out: Rows that are for testing, and make none.
    """

    first: np.ndarray
    lengths: np.ndarray | None
    left_out: int

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
    if not columns.listed and columns.split is None:
        return None
    num_rows = sum(group.rows for group in groups)
    counts, others = np.ones(num_rows, dtype=np.int64), np.zeros(num_rows, dtype=bool)
    lengths: list[np.ndarray] = []
    done = 0
    for captions, splits in _read(folder, files, groups, columns):
        end = done + max(len(captions), len(splits))
        if columns.listed:
            counts[done:end] = [len(said) for said in captions]
            lengths.append(np.array([_length(caption) for said in captions for caption in said], dtype=np.uint32))
        if columns.split is not None:
            others[done:end] = [is_of_another(split) for split in splits]
        done = end
        if count is not None and num_rows >= TOLD_EVERY:
            count(done, num_rows)
    return _made(counts, others, np.concatenate(lengths) if columns.listed else None)


def _made(counts: np.ndarray, others: np.ndarray, lengths: np.ndarray | None) -> RowIndex | None:
    left_out = int(others.sum())
    if left_out == len(others):  # a table for testing alone is what was asked for
        left_out = 0
    if left_out:
        lengths = None if lengths is None else lengths[~np.repeat(others, counts)]
        counts[others] = 0
    if lengths is None and not left_out:
        return None
    return RowIndex(np.concatenate([[0], np.cumsum(counts)]), lengths, left_out)


def _read(
    folder: Path, files: Sequence[str], groups: Sequence[RowGroup], columns: Columns
) -> Iterator[tuple[list[list[object]], list[Any]]]:
    """Yield lists of captions and what the rows are for, so many rows at a time; what is not asked for is empty."""
    for number, name in enumerate(files):
        wanted = [group.number for group in groups if group.file == number]
        if not wanted:
            continue
        try:
            with opened(folder / name) as file:
                names = [*(columns.leaves(file) if columns.listed else ()), *([columns.split] if columns.split else ())]
                parts = file.iter_batches(_ROWS_AT_ONCE, row_groups=wanted, columns=names, use_threads=False)
                for part in parts:
                    said = part.column(columns.caption).to_pylist() if columns.listed else []
                    yield (
                        [captions_in(captions) for captions in said],
                        part.column(columns.split).to_pylist() if columns.split else [],
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
