"""Parquet files with pictures and captions, as hubs keep them: read by row group, never whole.

The picture is a column of bytes, of `{bytes, path}` (the Hugging Face form), or of file names; the caption one of text.
A row group is held in memory at a time, so reading in order costs each group once, and reading at random reads a group
for every record: for a long training write the pictures as tar shards.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.data.record import Record
from minigpt4.data.sources.faults import LARGE_PICTURE, NO_PICTURE, BadRecordError, checked_text
from minigpt4.data.sources.guarded_folder import GuardedFolder
from minigpt4.data.sources.splits import LEFT_OUT, training_files
from minigpt4.data.sources.tables import FILE_COLUMNS, TEXT_COLUMNS
from minigpt4.errors import DataError
from minigpt4.processing.pictures import DEFAULT_LIMITS

MAX_GROUP_BYTES = 2 * 1024**3
"""Of a row group, unpacked: it is held in memory."""
_IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "picture", "img", "image_bytes", "bytes")


@dataclass(frozen=True)
class RowGroup:
    """A part of a file that is read at once.

    Args:
        file: Number of the file.
        number: Of the group in its file.
        start: Number of its first record.
        rows: How many it has.
    """

    file: int
    number: int
    start: int
    rows: int


@dataclass(frozen=True)
class ParquetSource:
    """Records of parquet files.

    Args:
        name: What a person calls it.
        folder: Holds the files.
        files: Their names in it.
        groups: Their row groups.
        columns: Of picture and caption.
        pictures: Where the pictures lie, if the files hold names.
        identity: A digest of names, sizes and groups.
        left_out: Files that are for testing.
    """

    name: str
    folder: Path
    files: tuple[str, ...]
    groups: tuple[RowGroup, ...]
    columns: tuple[str, str]
    pictures: GuardedFolder
    identity: str
    left_out: int = 0
    _held: dict[RowGroup, tuple[Any, Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def text_lengths(self) -> Sequence[int] | None:
        """Not known without reading everything."""
        return None

    @property
    def skipped(self) -> dict[str, int]:
        """Files that are for testing."""
        return {LEFT_OUT: self.left_out} if self.left_out else {}

    def __len__(self) -> int:
        return self.groups[-1].start + self.groups[-1].rows

    def __getstate__(self) -> dict[str, object]:
        """Go to another process without the row group that is held."""
        return {**self.__dict__, "_held": {}}

    def group(self, number: int) -> str:
        """Return the name of a record's file."""
        return self.files[self._group(number).file]

    def known_bad(self) -> list[int]:
        """Nothing is known without reading."""
        return []

    def read(self, number: int) -> Record:
        """Return a record.

        Raises:
            BadRecordError: It has no picture or no caption.
            DataError: The file is damaged, or there is no such record.
        """
        group = self._group(number)
        row = number - group.start
        key = f"{self.files[group.file]}:{number - next(g.start for g in self.groups if g.file == group.file)}"
        images, texts = self._columns_of(group)
        caption = checked_text(texts[row].as_py(), key)
        return Record(key, self._picture(images[row].as_py(), key), (("", caption),))

    def _group(self, number: int) -> RowGroup:
        if not 0 <= number < len(self):
            raise DataError(f"{self.name} has no record {number}, it has {len(self):,}")
        return self.groups[bisect_right(self.groups, number, key=lambda group: group.start) - 1]

    def _columns_of(self, group: RowGroup) -> tuple[Any, Any]:
        if group not in self._held:
            path = self.folder / self.files[group.file]
            try:
                with _opened(path) as file:
                    table = file.read_row_group(group.number, columns=list(self.columns), use_threads=False)
            except (OSError, ValueError, MemoryError) as error:  # the library's own errors are kinds of these
                raise _damaged(path, error) from error
            self._held.clear()
            self._held[group] = table.column(self.columns[0]), table.column(self.columns[1])
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
    path: Path, *, images: Path | None = None, text: str | None = None, within: Path | None = None
) -> ParquetSource:
    """Open parquet files.

    Args:
        path: A file, or a folder of files, which may lie in folders; those for testing are left out.
        images: Where the pictures lie, if the files hold names; left out: in `path`.
        text: The caption's column.
        within: Links may lead anywhere in this folder.

    Raises:
        DataError: pyarrow is not installed, there is no such file, it is damaged, or has no such columns.
    """
    folder = path if path.is_dir() else path.parent
    found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not found:
        raise DataError(f"no parquet files in {path}", "name the folder that holds them")
    files = training_files([file.relative_to(folder).as_posix() for file in found])
    groups: list[RowGroup] = []
    columns: tuple[str, str] | None = None
    for number, file in enumerate(files):
        columns = _add_groups(groups, number, folder / file, columns, text)
    if columns is None or not groups:
        raise DataError(f"the parquet files of {path} have no rows", "fetch them again")
    described = [columns, [(name, (folder / name).stat().st_size) for name in files], [vars(group) for group in groups]]
    identity = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    pictures = GuardedFolder(images or folder, within)
    left_out = len(found) - len(files)
    return ParquetSource(str(path), folder, tuple(files), tuple(groups), columns, pictures, identity, left_out)


def _add_groups(
    groups: list[RowGroup], number: int, path: Path, columns: tuple[str, str] | None, text: str | None
) -> tuple[str, str]:
    try:
        with _opened(path) as file:
            chosen = _choose_columns(file.schema_arrow, path, text)
            sizes = [
                (file.metadata.row_group(i).num_rows, file.metadata.row_group(i).total_byte_size)
                for i in range(file.metadata.num_row_groups)
            ]
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if columns is not None and chosen != columns:
        raise DataError(
            f"{path} has the columns {', '.join(chosen)}, the files before it {', '.join(columns)}",
            "put files with other columns in a folder of their own, as one source more",
        )
    for group, (rows, size) in enumerate(sizes):
        if size > MAX_GROUP_BYTES:
            raise DataError(f"{path}: row group {group} has {size:,} bytes, up to 2 GiB are read", "write smaller ones")
        start = groups[-1].start + groups[-1].rows if groups else 0
        if rows > 0:
            groups.append(RowGroup(number, group, start, rows))
    return chosen


def _opened(path: Path) -> Any:  # noqa: ANN401  (pyarrow.parquet.ParquetFile, which is optional)
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError("parquet files need pyarrow", 'pip install "minigpt4[data]"') from error
    return ParquetFile(path, memory_map=True, pre_buffer=False)


def _choose_columns(schema: Any, path: Path, text: str | None) -> tuple[str, str]:  # noqa: ANN401  (of pyarrow)
    """Find the columns of picture and caption.

    Raises:
        DataError: One is not there, or of another kind.
    """
    import pyarrow.types as kinds

    there = {name.lower(): name for name in schema.names}
    image = next((there[name] for name in (*_IMAGE_COLUMNS, *FILE_COLUMNS) if name in there), None)
    caption = next((there[name] for name in ([text.lower()] if text else TEXT_COLUMNS) if name in there), None)
    if image is None or caption is None:
        what = "picture, expected image" if image is None else f"caption, expected {text or ' or '.join(TEXT_COLUMNS)}"
        raise DataError(
            f"{path} has no column for the {what}, but it has {', '.join(schema.names)[:200]}",
            "rename a column, or name the caption's with `text`",
        )
    image_kind, text_kind = schema.field(image).type, schema.field(caption).type
    fields = {field.name for field in image_kind} if kinds.is_struct(image_kind) else set()
    plain = any(
        is_kind(image_kind)
        for is_kind in (kinds.is_binary, kinds.is_large_binary, kinds.is_string, kinds.is_large_string)
    )
    if not plain and not fields & {"bytes", "path"}:
        raise DataError(
            f"{path}: column {image} is {image_kind}, expected bytes, a file name, or {{bytes, path}}",
            "write the pictures' files, as they are on disk, into it",
        )
    if not (kinds.is_string(text_kind) or kinds.is_large_string(text_kind)):
        raise DataError(f"{path}: column {caption} is {text_kind}, expected text", "name another column with `text`")
    return image, caption


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return DataError(f"{path} is not a parquet file, or it is damaged: {reason}", "fetch it again")
