"""Parquet files with pictures and captions, as hubs keep them: read by row group, never whole.

The picture is a column of bytes, of `{bytes, path}` (the Hugging Face form), or of file names; the caption one of text,
or of lists with several, of which each is a record. A row group is held in memory at a time, so reading in order costs
each group once, and reading at random reads a group for every record: for a long training write the pictures as tar
shards. Which columns are meant, and which rows make which records, is in `parquet_rows`.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.data.record import Record
from minigpt4.data.sources.formats import Place, Request
from minigpt4.data.sources.parquet_rows import Columns, RowGroup, RowIndex, describe_files, index_rows, opened
from minigpt4.data.sources.safe_files import (
    LARGE_PICTURE,
    NO_PICTURE,
    BadRecordError,
    SafeFolder,
    checked_text,
    files_of_split,
)
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
        rows: Which records the rows make.
        pictures: Where the pictures lie, if the files hold names.
        identity: A digest of names, sizes, groups and which records the rows make.
        skipped: How many files and rows are passed over, by kind.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    groups: tuple[RowGroup, ...]
    columns: Columns
    rows: RowIndex
    pictures: SafeFolder
    identity: str
    skipped: dict[str, int]
    _held: dict[RowGroup, tuple[Any, Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def text_lengths(self) -> Sequence[int] | None:
        """Bytes of each caption, where they are in lists; else not known without reading everything."""
        return None if self.rows.lengths is None else self.rows.lengths  # type: ignore[return-value]  # an array

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, object]:
        """Go to another process without the row group that is held."""
        return {**self.__dict__, "_held": {}}

    def group(self, number: int) -> str:
        """Return the name of a record's file."""
        return self.files[self._place(number)[0].file]

    def barren(self) -> Sequence[str]:
        """Return no file: which pictures are missing is not known."""
        return ()

    def known_bad(self) -> list[int]:
        """Return the numbers of captions in lists that are none; nothing else is known without reading."""
        return self.rows.known_bad()

    def together(self) -> Iterable[Sequence[int]] | None:
        """Yield the numbers of the records of each row, which have its picture; those of bad ones by themselves."""
        return None if self.rows.lengths is None else self.rows.together()

    def read(self, number: int, *, with_picture: bool = True) -> Record:
        """Return a record, whose picture may be left out.

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
        row, at = self.rows.place(number)
        return self.groups[bisect_right(self.groups, row, key=lambda group: group.start) - 1], row, at

    def _columns_of(self, group: RowGroup) -> tuple[Any, Any]:
        if group not in self._held:
            with opened(self.folder / self.files[group.file]) as file:
                wanted = [self.columns.picture, *self.columns.leaves(file)]
                table = file.read_row_group(group.number, columns=wanted, use_threads=False)
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


def sniff(place: Place) -> Path | None:
    """Return a parquet file, or a folder with some in it or below, but for tables beside pictures with texts."""
    found = place.has(".parquet") and (place.deep or not place.path.is_dir()) and not place.has_pairs
    return place.path if found else None


def open_source(request: Request) -> ParquetSource:
    """Open a file, or a folder of files, which may lie in folders; those for testing are left out.

    Raises:
        DataError: pyarrow is not installed, there is no such file, it is damaged, or has no such columns.
    """
    path = request.path
    folder = path if path.is_dir() else path.parent
    found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not found:
        raise DataError(f"no parquet files in {path}", "name the folder that holds them")
    files, skipped = files_of_split([file.relative_to(folder).as_posix() for file in found])
    columns, groups = describe_files(folder, files, request.text)
    if not groups:
        raise DataError(f"the parquet files of {path} have no rows", "fetch them again")
    rows = index_rows(folder, files, groups, columns, request.count)
    if not len(rows):
        why = ", ".join(f"{number:,} x {what}" for what, number in rows.left_out.items()) or "empty lists of captions"
        raise DataError(f"the parquet files of {path} have no rows to learn from: {why}", "fetch them again")
    named = [columns.picture, columns.caption]
    described = [named, [(name, (folder / name).stat().st_size) for name in files], [vars(group) for group in groups]]
    digest = hashlib.sha256(json.dumps(described).encode())
    if rows.first is not None:
        digest.update(rows.first.tobytes() + (b"" if rows.lengths is None else rows.lengths.tobytes()))
    return ParquetSource(
        request.name,
        folder,
        tuple(files),
        groups,
        columns,
        rows,
        SafeFolder(request.images or folder, request.within),
        digest.hexdigest(),
        skipped | rows.left_out,
    )
