"""What parquet files hold: their row groups, and which of their columns are picture and captions.

Knows pyarrow, which is optional, and reads nothing but the files' ends.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.data.sources.conversations import TURNS
from minigpt4.data.sources.tables import (
    ADDRESS_COLUMNS,
    FILE_COLUMNS,
    SPLIT,
    TEXT_COLUMNS,
    WORDS,
    addresses_instead,
)
from minigpt4.errors import DataError

MAX_GROUP_BYTES = 2 * 1024**3
"""Of a row group, unpacked: it is held in memory."""
_STATUS = "status"
_IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "picture", "img", "image_bytes", "bytes")


@dataclass(frozen=True)
class RowGroup:
    """A part of a file that is read at once.

    Args:
        file: Number of the file.
        number: Of the group in its file.
        start: Number of its first row.
        rows: How many it has.
    """

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


def describe_files(folder: Path, files: Sequence[str], text: str | None) -> tuple[Columns | None, tuple[RowGroup, ...]]:
    """Read the ends of files that follow each other.

    Args:
        folder: Holds them.
        files: Their names in it.
        text: The caption's column, where it was named.

    Returns:
        Their columns, which are the same in all, and their row groups that have rows.

    Raises:
        DataError: pyarrow is not installed, a file is damaged, has no such columns or others than those before it.
    """
    groups: list[RowGroup] = []
    columns: Columns | None = None
    for number, name in enumerate(files):
        columns = _add_groups(groups, number, folder / name, columns, text)
    return columns, tuple(groups)


def opened(path: Path) -> Any:  # noqa: ANN401  (pyarrow.parquet.ParquetFile, which is optional)
    """Open a file.

    Raises:
        DataError: pyarrow is not installed.
        OSError: The file cannot be read.
        ValueError: It is damaged.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError("parquet files need pyarrow", 'pip install "minigpt4[data]"') from error
    return ParquetFile(path, memory_map=True, pre_buffer=False)


def damaged(path: Path, error: Exception) -> DataError:
    """Say that a file cannot be read."""
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return DataError(f"{path} is not a parquet file, or it is damaged: {reason}", "fetch it again")


def _add_groups(groups: list[RowGroup], number: int, path: Path, columns: Columns | None, text: str | None) -> Columns:
    try:
        with opened(path) as file:
            chosen = _choose_columns(file.schema_arrow, path, text)
            sizes = [
                (file.metadata.row_group(i).num_rows, file.metadata.row_group(i).total_byte_size)
                for i in range(file.metadata.num_row_groups)
            ]
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if columns is not None and chosen != columns:
        there, before = (f"{found.picture}, {found.caption}{' (lists)' * found.listed}" for found in (chosen, columns))
        raise DataError(
            f"{path} has the columns {there}, the files before it {before}",
            "put files with other columns in a folder of their own, as one source more",
        )
    for group, (rows, size) in enumerate(sizes):
        if size > MAX_GROUP_BYTES:
            raise DataError(f"{path}: row group {group} has {size:,} bytes, up to 2 GiB are read", "write smaller ones")
        start = groups[-1].start + groups[-1].rows if groups else 0
        if rows > 0:
            groups.append(RowGroup(number, group, start, rows))
    return chosen


def _choose_columns(schema: Any, path: Path, text: str | None) -> Columns:  # noqa: ANN401  (of pyarrow)
    """Find the columns of picture and captions.

    Raises:
        DataError: One is not there, or of another kind.
    """
    there = {name.lower(): name for name in schema.names}
    image = _first(there, (*_IMAGE_COLUMNS, *FILE_COLUMNS))
    caption = _first(there, [text.lower()] if text else TEXT_COLUMNS)
    if image is None and _first(there, ADDRESS_COLUMNS):
        raise addresses_instead(path)
    if caption is None and not text and (talk := _first(there, ("question", *TURNS, "texts"))):
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
    _refuse_other_pictures(schema.field(image).type, image, path)
    kind = schema.field(caption).type
    listed = _is_list(kind)
    inner = kind.value_type if listed else kind
    words = None if _is_text(inner) else _words_of(inner)
    if words is None and not _is_text(inner):
        raise DataError(
            f"{path}: column {caption} is {str(kind)[:200]}, expected text or lists of text",
            "name another column with `text`",
        )
    split, status = (_text_column(there, name, schema) for name in (SPLIT, _STATUS))
    return Columns(image, caption, words, listed, split, status if "error_message" in there else None)


def _text_column(there: dict[str, str], name: str, schema: Any) -> str | None:  # noqa: ANN401  (of pyarrow)
    found = there.get(name)
    return found if found is not None and _is_text(schema.field(found).type) else None


def _first(there: dict[str, str], names: Iterable[str]) -> str | None:
    return next((there[name] for name in names if name in there), None)


def _refuse_other_pictures(kind: Any, image: str, path: Path) -> None:  # noqa: ANN401  (a type of pyarrow)
    import pyarrow.types as kinds

    fields = {field.name for field in kind} if kinds.is_struct(kind) else set()
    if _is_text(kind) or kinds.is_binary(kind) or kinds.is_large_binary(kind) or fields & {"bytes", "path"}:
        return
    raise DataError(
        f"{path}: column {image} is {str(kind)[:200]}, expected bytes, a file name, or {{bytes, path}}",
        "write the pictures' files, as they are on disk, into it",
    )


def _is_text(kind: Any) -> bool:  # noqa: ANN401  (a type of pyarrow)
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):  # the same text many times, as table libraries write categories
        kind = kind.value_type
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind))


def _is_list(kind: Any) -> bool:  # noqa: ANN401  (a type of pyarrow)
    import pyarrow.types as kinds

    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


def _words_of(kind: Any) -> str | None:  # noqa: ANN401  (a type of pyarrow)
    """Return which field of an object holds its words."""
    import pyarrow.types as kinds

    if not kinds.is_struct(kind):
        return None
    texts = {field.name for field in kind if _is_text(field.type)}
    return next((name for name in WORDS if name in texts), None)
