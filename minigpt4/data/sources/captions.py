"""Pictures with captions: a folder with a table, a table alone, or a text file beside each picture.

The table is `captions.csv`, `.tsv`, `.json` or `.jsonl` (or `metadata.*`, as hubs name it): a row for each picture,
with a column for the file and one for the caption, or for a list of some, under their usual names; JSON may also be
`{"cat.jpg": "a cat"}` or COCO's `{"images": [...], "annotations": [...]}`. A picture no row names, a row without its
picture and a text without its picture are bad records: counted, not passed over in silence.
"""

import csv
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from minigpt4.data.sources.faults import (
    LARGE_TEXT,
    MISSING_PICTURE,
    NO_PICTURE,
    NO_TEXT,
    WRONG_TEXT,
    BadRecordError,
    checked_text,
)
from minigpt4.data.sources.guarded_folder import PICTURE_SUFFIXES, GuardedFolder, files_in, leaves_folder
from minigpt4.data.sources.listed import Count, ListSource, Rows, items_of, list_source, picture_name, read_json
from minigpt4.errors import DataError

TABLES = [f"{stem}.{suffix}" for stem in ("captions", "metadata") for suffix in ("csv", "tsv", "json", "jsonl")]
FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "image_id", "picture", "path", "img")
TEXT_COLUMNS = ("caption", "text", "title", "description", "sentence", "captions", "sentences")
_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
_FOLDERS = ("", "images/", "image/")

Row = tuple[str, Any]
"""A name for people, and a mapping or what went wrong."""


def open_captions(
    path: Path,
    *,
    images: Path | None = None,
    text: str | None = None,
    within: Path | None = None,
    count: Count | None = None,
) -> ListSource:
    """Open pictures with captions.

    Args:
        path: A folder, or a table.
        images: Where the pictures lie; left out: beside the table.
        text: The caption's column.
        within: Links may lead anywhere in this folder.
        count: Told of the rows read.

    Raises:
        DataError: There is nothing of the kind, or the table has no such columns.
    """
    table = path if path.is_file() else table_in(path)
    folder = images or (path.parent if path.is_file() else path)
    files = {} if images and table else dict(files_in(folder))
    rows = Rows(count=count)
    if table is None and text:
        raise DataError(f"{path} has captions in text files, so `text` changes nothing", "leave text out")
    if table is None:
        _add_sidecars(rows, files)
    else:
        named = _add_table(rows, table, text, None if images else files, folder)
        if path.is_dir():
            _add_unnamed(rows, files, named, table.name)
    sizes = sorted((name, size) for name, size in files.items() if _is_picture(name))
    return list_source(str(path), table or path, GuardedFolder(folder, within), rows, sizes)


def table_in(folder: Path) -> Path | None:
    """Return a folder's table by its usual names, in large or small letters; of several the first in `TABLES`."""
    alike = sorted(path for path in folder.iterdir() if path.name.lower() in TABLES and path.is_file())
    return min(alike, key=lambda path: TABLES.index(path.name.lower()), default=None)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES)


def _add_sidecars(rows: Rows, files: Mapping[str, int]) -> None:
    """Add `cat.jpg` with `cat.txt` or `cat.TXT`, and each of both without the other as bad."""
    stems = {name.rpartition(".")[0] for name in files if _is_picture(name)}
    texts = {name.rpartition(".")[0]: name for name in files if name.lower().endswith(".txt")}
    others = {name.rpartition(".")[0]: name for name in files if not name.lower().endswith(".txt")}
    for name in files:
        stem = name.rpartition(".")[0]
        if _is_picture(name):
            if (text := texts.get(stem)) is not None:
                rows.add_sidecar(name, name, text, files[text])
            else:
                rows.add_bad(BadRecordError(NO_TEXT, f"{name} has no caption, expected {stem}.txt"))
        elif name.lower().endswith(".txt") and stem not in stems:
            other = f", but {others[stem]}; read are {', '.join(PICTURE_SUFFIXES)}" if stem in others else ""
            rows.add_bad(BadRecordError(NO_PICTURE, f"{name} has no picture of its name{other}"))


def _add_table(rows: Rows, table: Path, text: str | None, files: Mapping[str, int] | None, folder: Path) -> set[str]:
    """Add the rows of a table.

    Args:
        rows: To add to.
        table: The file.
        text: The caption's column.
        files: What lies in the folder of the pictures; None where that is not known.
        folder: That folder.

    Returns:
        The pictures that are named.
    """
    columns: tuple[str, str] | None = None
    complaint: DataError | None = None
    lower: Mapping[str, str] = {}
    named = set()
    for key, row in _table_rows(table):
        try:
            found = _checked_row(row, key)
            columns = columns or _columns(found, text, table)
            name = picture_name(found.get(columns[0]), key)
            places = _places(name)
            if files is not None and not leaves_folder(name):
                places = [place for place in places if place in files][:1]
                if not places:
                    lower = lower or {_plain(file): file for file in files}
                    alike = _in_other_letters(name, lower) or _behind_a_link(name, folder)
                    raise BadRecordError(MISSING_PICTURE, f"{key}: the picture {name[:200]!r} is not there{alike}")
                named.add(places[0])
            said = found.get(columns[1])
            for caption in said if isinstance(said, list) and said else [said]:
                rows.add(places[0], places, [("", checked_text(caption, f"{key} ({name[:200]})"))])
        except BadRecordError as error:
            rows.add_bad(error)
        except DataError as error:  # a row without the columns; perhaps the others have them
            complaint = complaint or error
            rows.add_bad(BadRecordError(WRONG_TEXT, f"{key}: the row has no picture and caption under the usual names"))
    if columns is None and complaint:
        raise complaint
    return named


def _checked_row(row: object, key: str) -> Mapping[str, Any]:
    if isinstance(row, BadRecordError):
        raise row
    if not isinstance(row, Mapping):
        raise BadRecordError(WRONG_TEXT, f"{key} is not an object with a picture and a caption")
    return row


def _add_unnamed(rows: Rows, files: Mapping[str, int], named: set[str], table: str) -> None:
    for name in files:
        if _is_picture(name) and name not in named:
            rows.add_bad(BadRecordError(NO_TEXT, f"{name} has no caption, {table} does not name it"))


def _places(name: str) -> list[str]:
    """Return where the picture of a name may lie: an id stands for a file with the usual endings."""
    name = str(PurePosixPath(name))  # "./cat.jpg" and "a//cat.jpg" are names that programs write
    endings = ("",) if _is_picture(name) else ("", *PICTURE_SUFFIXES)
    return [f"{folder}{name}{ending}" for folder in _FOLDERS for ending in endings]


def _plain(name: str) -> str:
    """Return a name in lower case, its accents one way: systems write them in two (Unicode's NFC and NFD)."""
    return unicodedata.normalize("NFC", name).lower()


def _in_other_letters(name: str, files: Mapping[str, str]) -> str:
    """Say which of the files, by their plain names, a picture that is not there may be.

    A name may have been written on another system, with backslashes, or begin with folders above this one.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    places = [_plain(place) for start in range(len(parts)) for place in _places("/".join(parts[start:]))]
    found = next((files[place] for place in places if place in files), None)
    if not found:
        return ""
    accents = found.lower() != _plain(found) or name.lower() != _plain(name)
    return f", but {found} is{', its accents written another way (Unicode NFC or NFD)' if accents else ''}"


def _behind_a_link(name: str, folder: Path) -> str:
    above = PurePosixPath(name).parts[:-1]
    linked = bool(above) and (folder / above[0]).is_symlink()
    return f", and {above[0]} is a link to a folder, which is not followed" if linked else ""


def _columns(row: Mapping[str, Any], text: str | None, table: Path) -> tuple[str, str]:
    """Find the columns for file and caption.

    Raises:
        DataError: One is not there.
    """
    names = {str(name).strip().lower(): str(name) for name in row}
    usual = {"picture": FILE_COLUMNS, "caption": (text.lower(),) if text else TEXT_COLUMNS}
    chosen = {what: next((names[name] for name in usual[what] if name in names), None) for what in usual}
    picture, caption = chosen["picture"], chosen["caption"]
    if picture is None or caption is None:
        lacking = [what for what, found in chosen.items() if found is None]
        expected = " and ".join(f"no column for the {what}, expected {' or '.join(usual[what])}" for what in lacking)
        there = ", ".join(map(str, row))[:200] or "none"
        renamed = " and ".join({"picture": "file_name", "caption": usual["caption"][0]}[what] for what in lacking)
        named = ", or name the caption's column with `text` (--text)" if caption is None else ""
        raise DataError(f"{table} has {expected}, but it has {there}", f"rename a column to {renamed}{named}")
    return picture, caption


def _table_rows(table: Path) -> Iterator[Row]:
    suffix = table.suffix.lower()
    if suffix in (".csv", ".tsv"):
        yield from _csv_rows(table, "\t" if suffix == ".tsv" else "")
    elif suffix == ".json":
        yield from _json_rows(table)
    else:
        yield from items_of(table)


def _csv_rows(table: Path, delimiter: str) -> Iterator[Row]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if not delimiter:
                header = file.readline(65536)
                delimiter = max(",;\t", key=header.count)
                file.seek(0)
            lines: list[str] = []
            reader = csv.DictReader(_noted(file, lines), delimiter=delimiter)
            num_columns = _num_columns(reader, table)
            while True:
                lines.clear()
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:  # a field beyond the library's limit of 128 KiB
                    key = f"{table.name}:{reader.line_num}"
                    yield key, BadRecordError(LARGE_TEXT, f"{key}: the row cannot be read: {error}")
                    continue
                key = f"{table.name}:{reader.line_num}"
                beyond = row.pop(None, [])  # where the library puts what has no column
                if len(lines) > 1 and not _is_well_quoted(lines, delimiter):
                    said = f"{key}: {len(lines)} lines are one row, as a quote opens there that is not closed"
                    yield key, BadRecordError(WRONG_TEXT, said)
                elif any(value.strip() for value in beyond):
                    said = f"{key}: the row has {num_columns + len(beyond)} fields and the table {num_columns} columns"
                    yield key, BadRecordError(WRONG_TEXT, f"{said}, a caption with {_NAMES[delimiter]} needs quotes")
                else:
                    yield key, row
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8", "save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{table} cannot be read: {error.strerror}", "check the path") from error


def _num_columns(reader: "csv.DictReader[str]", table: Path) -> int:
    try:
        return len(reader.fieldnames or ())
    except csv.Error as error:
        raise DataError(f"{table}: its first line cannot be read: {error}", "write names of columns there") from error


def _noted(file: Iterable[str], lines: list[str]) -> Iterator[str]:
    for line in file:
        lines.append(line)
        yield line


def _is_well_quoted(lines: Sequence[str], delimiter: str) -> bool:
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    return True


def _json_rows(table: Path) -> Iterator[Row]:
    content = read_json(table)
    if isinstance(content, list):
        yield from ((f"{table.name}:{number}", item) for number, item in enumerate(content, 1))
    elif isinstance(content, dict) and isinstance(content.get("annotations"), list):
        files = _coco_files(content.get("images"))
        for number, item in enumerate(content["annotations"], 1):
            key = f"{table.name}:{number}"
            if files and isinstance(item, dict):
                item = {"file_name": files.get(str(item.get("image_id"))), **item}
            yield key, item
    elif isinstance(content, dict):
        for name, caption in content.items():
            yield f"{table.name}:{name[:80]}", {"file_name": name, "caption": caption}
    else:
        raise DataError(f"{table} is neither a list nor an object", "write a list of pictures with captions")


def _coco_files(images: object) -> Mapping[str, str]:
    """Return the file of each picture's id in COCO's form."""
    listed: Sequence[Any] = images if isinstance(images, list) else []
    return {
        str(image["id"]): str(image["file_name"])
        for image in listed
        if isinstance(image, dict) and "id" in image and "file_name" in image
    }
