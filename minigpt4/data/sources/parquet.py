"""Parquet files with pictures and captions, as hubs keep them: read by row group, never whole.

The picture is a column of bytes, of `{bytes, path}` (the Hugging Face form), or of file names; the caption one of text,
or of lists with several, of which each is a record. A row group is held in memory at a time, so reading in order costs
each group once, and reading at random reads a group for every record: for a long training write the pictures as tar
shards.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from minigpt4.data.record import Record
from minigpt4.data.sources.faults import LARGE_PICTURE, NO_PICTURE, BadRecordError, checked_text
from minigpt4.data.sources.guarded_folder import GuardedFolder
from minigpt4.data.sources.listed import Count
from minigpt4.data.sources.parquet_files import Columns, RowGroup, damaged, describe_files, opened
from minigpt4.data.sources.parquet_rows import RowIndex, index_rows
from minigpt4.data.sources.splits import LEFT_OUT, training_files
from minigpt4.data.sources.tables import captions_in
from minigpt4.errors import DataError
from minigpt4.processing.pictures import DEFAULT_LIMITS


@dataclass(frozen=True)
class ParquetSource:
    """Records of parquet files.

    Args:
        name: What a person calls it.
        folder: Holds the files.
        files: Their names in it.
        groups: Their row groups.
        columns: Of picture and captions.
        pictures: Where the pictures lie, if the files hold names.
        identity: A digest of names, sizes, groups and which records the rows make.
        rows: Which records the rows make; None where it is one each.
        left_out: Files that are for testing.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    groups: tuple[RowGroup, ...]
    columns: Columns
    pictures: GuardedFolder
    identity: str
    rows: RowIndex | None = None
    left_out: int = 0
    _held: dict[RowGroup, tuple[Any, Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def text_lengths(self) -> Sequence[int] | None:
        """Bytes of each caption, where they stand in lists; else not known without reading everything."""
        return None if self.rows is None else cast("Sequence[int] | None", self.rows.lengths)

    @property
    def skipped(self) -> dict[str, int]:
        """Files and rows that are for testing, and rows without a picture that say why."""
        files = {LEFT_OUT: self.left_out} if self.left_out else {}
        return files | (self.rows.left_out if self.rows else {})

    def __len__(self) -> int:
        return len(self.rows) if self.rows else self.groups[-1].start + self.groups[-1].rows

    def __getstate__(self) -> dict[str, object]:
        """Go to another process without the row group that is held."""
        return {**self.__dict__, "_held": {}}

    def group(self, number: int) -> str:
        """Return the name of a record's file."""
        return self.files[self._place(number)[0].file]

    def known_bad(self) -> list[int]:
        """Return the numbers of captions in lists that are none; nothing else is known without reading."""
        return self.rows.known_bad() if self.rows else []

    def together(self) -> Iterable[Sequence[int]]:
        """Yield the numbers of the records of each row, which have its picture; those of bad ones by themselves."""
        return self.rows.together() if self.rows else ([number] for number in range(len(self)))

    def read(self, number: int, *, with_picture: bool = True) -> Record:
        """Return a record.

        Args:
            number: Which.
            with_picture: Read its picture; else it has none.

        Raises:
            BadRecordError: It has no picture or no caption.
            DataError: The file is damaged, or there is no such record.
        """
        group, row, at = self._place(number)
        key = f"{self.files[group.file]}:{row - next(g.start for g in self.groups if g.file == group.file)}"
        images, texts = self._columns_of(group)
        caption = checked_text(captions_in(texts[row - group.start].as_py())[at], key)
        picture = self._picture(images[row - group.start].as_py(), key) if with_picture else None
        return Record(key, picture, (("", caption),))

    def _place(self, number: int) -> tuple[RowGroup, int, int]:
        """Return a record's row group, its row, and its place among the records of that row."""
        if not 0 <= number < len(self):
            raise DataError(f"{self.name} has no record {number}, it has {len(self):,}")
        row, at = self.rows.place(number) if self.rows else (number, 0)
        return self.groups[bisect_right(self.groups, row, key=lambda group: group.start) - 1], row, at

    def _columns_of(self, group: RowGroup) -> tuple[Any, Any]:
        if group not in self._held:
            path = self.folder / self.files[group.file]
            try:
                with opened(path) as file:
                    wanted = [self.columns.picture, *self.columns.leaves(file)]
                    table = file.read_row_group(group.number, columns=wanted, use_threads=False)
            except (OSError, ValueError, MemoryError) as error:  # the library's own errors are kinds of these
                raise damaged(path, error) from error
            self._held.clear()
            self._held[group] = table.column(self.columns.picture), table.column(self.columns.caption)
        return self._held[group]

    def _picture(self, value: object, key: str) -> bytes:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            return self.pictures.read_picture([value], key)
        if not isinstance(value, bytes) or not value:
            raise BadRecordError(NO_PICTURE, f"{key} has no picture")
        if len(value) > DEFAULT_LIMITS.max_bytes:
            limit = DEFAULT_LIMITS.max_bytes // 1024**2
            raise BadRecordError(
                LARGE_PICTURE, f"{key}: the picture has {len(value):,} bytes, up to {limit} MiB are read"
            )
        return value


def open_parquet(
    path: Path,
    *,
    images: Path | None = None,
    text: str | None = None,
    within: Path | None = None,
    count: Count | None = None,
) -> ParquetSource:
    """Open parquet files.

    Args:
        path: A file, or a folder of files, which may lie in folders; those for testing are left out.
        images: Where the pictures lie, if the files hold names; left out: in `path`.
        text: The caption's column.
        within: Links may lead anywhere in this folder.
        count: Told of the rows whose lists of captions are read.

    Raises:
        DataError: pyarrow is not installed, there is no such file, it is damaged, or has no such columns.
    """
    folder = path if path.is_dir() else path.parent
    found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not found:
        raise DataError(f"no parquet files in {path}", "name the folder that holds them")
    files = training_files([file.relative_to(folder).as_posix() for file in found])
    columns, groups = describe_files(folder, files, text)
    if columns is None or not groups:
        raise DataError(f"the parquet files of {path} have no rows", "fetch them again")
    rows = index_rows(folder, files, groups, columns, count)
    if rows is not None and not len(rows):
        why = ", ".join(f"{number:,} x {what}" for what, number in rows.left_out.items()) or "empty lists of captions"
        raise DataError(f"the parquet files of {path} have no rows to learn from: {why}", "fetch them again")
    named = [columns.picture, columns.caption]
    described = [named, [(name, (folder / name).stat().st_size) for name in files], [vars(group) for group in groups]]
    digest = hashlib.sha256(json.dumps(described).encode())
    if rows is not None:
        digest.update(rows.first.tobytes() + (b"" if rows.lengths is None else rows.lengths.tobytes()))
    pictures = GuardedFolder(images or folder, within)
    left_out = len(found) - len(files)
    return ParquetSource(str(path), folder, tuple(files), groups, columns, pictures, digest.hexdigest(), rows, left_out)
