"""Tables of captions: their rows, whatever the file's form, and which of their columns are picture and caption.

CSV (with commas, semicolons, tabs or bars), JSON and JSON Lines are read; JSON may also be `{"cat.jpg": "a cat"}`,
COCO's `{"images": [...], "annotations": [...]}`, or Karpathy's `{"images": [{"filename", "sentences", "split"}]}`. A
caption may be a list of some. Knows no folder of pictures.
"""

import ast
import csv
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from minigpt4.data.sources.lists import MAX_LINE_BYTES, items_of, numbered, read_json
from minigpt4.data.sources.safe_files import LARGE_TEXT, WRONG_TEXT, BadRecordError, is_address, is_picture
from minigpt4.errors import DataError

FILE_COLUMNS = (
    "file_name", "filename", "file", "image", "image_path", "image_id", "picture", "path", "img", "image_name",
)  # fmt: skip
TEXT_COLUMNS = (
    "caption", "text", "title", "description", "sentence", "captions", "sentences", "comment", "raw", "sentences_raw",
    "caption_str",
)  # fmt: skip
WORDS = ("raw", "caption", "text", "sentence")
"""Where the words of a caption lie that is an object, as COCO's `sentences` are."""
SPLIT = "split"
"""A column that says what a row is for."""

_USUAL = [f"{stem}.{suffix}" for stem in ("captions", "metadata") for suffix in ("csv", "tsv", "json", "jsonl")]
_FLICKR = ["captions.txt", "results.csv", "flickr8k.token.txt", "results_20130124.token"]
"""Names of Flickr8k's and Flickr30k's tables, of which other files have some as well."""
_TOKEN = re.compile(r"([^\t#]+)#\d+\t(.*)", re.DOTALL)
"""A line of the older ones: `cat.jpg#0`, a tab and a caption."""
ADDRESS_COLUMNS = ("url", "image_url", "img_url", "coco_url", "link")
_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_MAX_HEADER = 65536


class Row(NamedTuple):
    """A row of a table: its name for people, what is in it (of a bad row, what is known), and what is wrong with it."""

    key: str
    fields: Any
    fault: BadRecordError | None = None


def table_in(folder: Path) -> Path | None:
    """Return a folder's table by its usual names, in large or small letters; of several the first in their order."""
    names = [*_USUAL, *_FLICKR]
    alike = sorted(path for path in folder.iterdir() if path.name.lower() in names)
    found = [path for path in alike if path.is_file() and (path.name.lower() in _USUAL or is_table(path))]
    return min(found, key=lambda path: names.index(path.name.lower()), default=None)


def is_table(path: Path) -> bool:
    """Return whether a file's first line names columns of picture and caption."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline(_MAX_HEADER)
        names = {name.strip().lower() for name in next(csv.reader([header], delimiter=_delimiter(header)), ())}
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    return _is_token(header) or (not names.isdisjoint(FILE_COLUMNS) and not names.isdisjoint(TEXT_COLUMNS))


def rows_of(table: Path) -> Iterator[Row]:
    """Yield the rows of a table; a bad one has its fault with it.

    Raises:
        DataError: The file cannot be read, or is no table.
    """
    suffix = table.suffix.lower()
    if suffix in (".csv", ".tsv", ".txt", ".token"):
        return _csv_rows(table, "\t" if suffix == ".tsv" else "")
    items = _json_items(table) if suffix == ".json" else items_of(table)
    return (Row(key, {}, item) if isinstance(item, BadRecordError) else Row(key, item) for key, item in items)


def columns_of(row: Mapping[str, Any], text: str | None, table: Path) -> tuple[str, str]:
    """Find the columns for picture and caption.

    Args:
        row: One of the table's rows.
        text: The caption's column, where it was named.
        table: For the complaint.

    Raises:
        DataError: One is not there.
    """
    names = {str(name).strip().lower(): str(name) for name in row}
    usual = {"picture": FILE_COLUMNS, "caption": (text.lower(),) if text else TEXT_COLUMNS}
    chosen = {what: next((names[name] for name in usual[what] if name in names), None) for what in usual}
    picture, caption = chosen["picture"], chosen["caption"]
    if picture is not None and caption is not None:
        return picture, caption
    there = ", ".join(map(str, row))[:200] or "none"
    if picture is None and (set(names).intersection(ADDRESS_COLUMNS) or any(map(is_address, names))):
        raise addresses_instead(table)
    if any(map(is_picture, names)):
        raise DataError(
            f"the first line of {table} is a row, expected the names of its columns: {there}",
            "write a line above it, such as file_name,caption",
        )
    lacking = [what for what, found in chosen.items() if found is None]
    expected = " and ".join(f"no column for the {what}, expected {' or '.join(usual[what])}" for what in lacking)
    renamed = " and ".join({"picture": "file_name", "caption": usual["caption"][0]}[what] for what in lacking)
    named = ", or name the caption's column with `text` (--text)" if caption is None else ""
    raise DataError(f"{table} has {expected}, but it has {there}", f"rename a column to {renamed}{named}")


def addresses_instead(table: Path) -> DataError:
    """Say that a table has addresses of pictures and no pictures."""
    return DataError(
        f"{table} has addresses of pictures and no pictures, which are read from this machine's disks",
        "fetch them first, as docs/training.md says (img2dataset), and name the folder with its shards",
    )


def captions_in(said: object) -> list[object]:
    """Return the captions in a field of a table, at least one, which need not be text: of an object its words."""
    return [_words(item) for item in said] or [None] if isinstance(said, list | tuple) else [_words(said)]


def _words(said: object) -> object:
    return next((said[name] for name in WORDS if name in said), said) if isinstance(said, Mapping) else said


def _is_token(line: str) -> bool:
    match = _TOKEN.match(line)
    return match is not None and is_picture(match[1])


def _delimiter(header: str) -> str:
    return max(_DELIMITERS, key=header.count)


def _csv_rows(table: Path, delimiter: str) -> Iterator[Row]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline(_MAX_HEADER)
            file.seek(0)
            if _is_token(header):
                yield from _token_rows(table.name, file)
                return
            delimiter = delimiter or _delimiter(header)
            lines: list[str] = []
            reader = csv.DictReader(_noted(file, lines), delimiter=delimiter)
            columns, row = _names_of(reader, table), None
            while row != {}:
                lines.clear()
                try:
                    row = next(reader, {})
                except csv.Error as error:  # a field beyond the library's limit of 128 KiB
                    key = f"{table.name}:{reader.reader.line_num}"
                    known = dict(zip(columns, lines[0].split(delimiter), strict=False))
                    yield Row(key, known, BadRecordError(LARGE_TEXT, f"{key}: the row cannot be read: {error}"))
                else:  # spreadsheets leave rows of nothing but delimiters
                    if any("".join(value or "").strip() for value in row.values()):
                        yield _csv_row(f"{table.name}:{reader.line_num}", row, lines, delimiter)
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8", "save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{table} cannot be read: {error.strerror}", "check the path") from error


def _token_rows(name: str, file: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        key = f"{name}:{number}"
        if match := _TOKEN.fullmatch(line.strip()):
            yield Row(key, {"file_name": match[1], "caption": match[2]})
        elif line.strip():
            yield Row(key, {}, BadRecordError(WRONG_TEXT, f"{key} is not a picture's name with #, a tab and a caption"))


def _csv_row(key: str, row: dict[Any, Any], lines: Sequence[str], delimiter: str) -> Row:
    """Return a row as the library read it from some lines, or what is wrong with it."""
    beyond = row.pop(None, [])  # where the library puts what has no column
    if delimiter == "|":  # written with blanks round it
        row = {name: value.strip() if value else value for name, value in row.items()}
    if len(lines) > 1 and not _is_well_quoted(lines, delimiter):
        said = f"{key}: {len(lines)} lines are one row, as a quote opens there that is not closed"
        return Row(key, row, BadRecordError(WRONG_TEXT, said))
    if any(value.strip() for value in beyond):
        said = f"{key}: the row has {len(row) + len(beyond)} fields and the table {len(row)} columns"
        said = f"{said}, a caption with {_DELIMITERS[delimiter]} needs quotes"
        return Row(key, row, BadRecordError(WRONG_TEXT, said))
    there = sum(value is not None for value in row.values())
    if there < len(row):  # is no fault where picture and caption are there
        key = f"{key} ({there} of {len(row)} fields)"
    return Row(key, {name: _listed(value) for name, value in row.items()})


def _listed(field: str | None) -> object:
    """Return the list that a field holds as JSON or as Python writes it; any other field as it is."""
    if not field or field[:2] not in ('["', "['"):
        return field
    try:
        found = json.loads(field)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings(action="ignore"):  # of a backslash that means nothing
                found = ast.literal_eval(field)  # reads values and runs nothing
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return field
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else field


def _names_of(reader: "csv.DictReader[str]", table: Path) -> Sequence[str]:
    try:
        names = reader.fieldnames or ()
    except csv.Error as error:
        raise DataError(f"{table}: its first line cannot be read: {error}", "write names of columns there") from error
    usual = [name for name in (name.strip().lower() for name in names) if name in (*FILE_COLUMNS, *TEXT_COLUMNS)]
    if twice := next((name for name in usual if usual.count(name) > 1), None):
        raise DataError(f"{table} has more than one column {twice}", "rename those that are not meant")
    return names


def _noted(file: TextIO, lines: list[str]) -> Iterator[str]:
    while line := file.readline(MAX_LINE_BYTES):
        lines.append(line)
        yield line


def _is_well_quoted(lines: Sequence[str], delimiter: str) -> bool:
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    return True


def _json_items(table: Path) -> Iterator[tuple[str, Any]]:
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        outermost[:] = pairs  # the last object that ends is the one round all others
        return dict(pairs)

    content = read_json(table, keep)
    if isinstance(content, list):
        return numbered(table, content)
    if not isinstance(content, dict):
        raise DataError(f"{table} is neither a list nor an object", "write a list of pictures with captions")
    if isinstance(content.get("annotations"), list):
        files = _coco_files(content.get("images"))
        items = numbered(table, content["annotations"])
        return ((key, _with_file(item, files) if files and isinstance(item, dict) else item) for key, item in items)
    for name in ("images", "data"):  # Karpathy's; TextCaps
        if isinstance(content.get(name), list):
            return numbered(table, content[name])
    # Of the pairs, not of the dict: a picture may be there twice.
    return ((f"{table.name}:{name[:80]}", {"file_name": name, "caption": said}) for name, said in outermost)


def _with_file(item: dict[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    return {"file_name": files.get(str(item.get("image_id"))), **item}


def _coco_files(images: object) -> Mapping[str, str]:
    """Return the file of each picture's id in COCO's form."""
    listed: Sequence[Any] = images if isinstance(images, list) else []
    return {
        str(image["id"]): str(image["file_name"])
        for image in listed
        if isinstance(image, dict) and "id" in image and "file_name" in image
    }
