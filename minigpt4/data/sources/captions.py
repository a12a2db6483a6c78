"""Pictures with captions: a folder with a table, a table alone, or a text file beside each picture.

The table is `captions.csv`, `.tsv`, `.json` or `.jsonl` (or `metadata.*`, as hubs name it; Flickr8k's `captions.txt`,
Flickr30k's `results.csv`): a row for each picture, with a column for the file and one for the caption, or for a list of
some, under their usual names (`tables.py`). A picture no row names, a row without its picture and a text without its
picture are bad records: counted, not passed over in silence.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from minigpt4.data.sources.faults import (
    MISSING_PICTURE,
    NO_PICTURE,
    NO_TEXT,
    WRONG_TEXT,
    BadRecordError,
    checked_text,
)
from minigpt4.data.sources.guarded_folder import (
    PICTURE_SUFFIXES,
    GuardedFolder,
    files_in,
    is_picture,
    leaves_folder,
    refuse_address,
)
from minigpt4.data.sources.listed import Count, ListSource, Rows, list_source, picture_name
from minigpt4.data.sources.splits import ROW_LEFT_OUT, is_of_another
from minigpt4.data.sources.tables import SPLIT, Row, captions_in, columns_of, rows_of, table_in
from minigpt4.errors import DataError

_FOLDERS = ("", "images/", "image/")
_FOLDER_COLUMN = "filepath"
"""In Karpathy's lists of COCO: the folder of a row's picture."""


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
        reading = _Reading(table, text, folder, None if images else files)
        reading.add_to(rows)
        if path.is_dir():
            _add_unnamed(rows, files, reading.named, table.name)
    sizes = sorted((name, size) for name, size in files.items() if is_picture(name))
    return list_source(str(path), table or path, GuardedFolder(folder, within), rows, sizes)


def _add_sidecars(rows: Rows, files: Mapping[str, int]) -> None:
    """Add `cat.jpg` with `cat.txt` or `cat.TXT`, and each of both without the other as bad."""
    stems = {name.rpartition(".")[0] for name in files if is_picture(name)}
    texts = {name.rpartition(".")[0]: name for name in files if name.lower().endswith(".txt")}
    others = {name.rpartition(".")[0]: name for name in files if not name.lower().endswith(".txt")}
    for name in files:
        stem = name.rpartition(".")[0]
        if is_picture(name):
            if (text := texts.get(stem)) is not None:
                rows.add_sidecar(name, name, text, files[text])
            else:
                rows.add_bad(BadRecordError(NO_TEXT, f"{name} has no caption, expected {stem}.txt"))
        elif name.lower().endswith(".txt") and stem not in stems:
            other = f", but {others[stem]}; read are {', '.join(PICTURE_SUFFIXES)}" if stem in others else ""
            rows.add_bad(BadRecordError(NO_PICTURE, f"{name} has no picture of its name{other}"))


def _add_unnamed(rows: Rows, files: Mapping[str, int], named: set[str], table: str) -> None:
    for name in files:
        if is_picture(name) and name not in named:
            rows.add_bad(BadRecordError(NO_TEXT, f"{name} has no caption, {table} does not name it"))


def _places(name: str, folders: Iterable[str]) -> list[str]:
    """Return where the picture of a name may lie: an id stands for a file with the usual endings."""
    if "//" in name or "./" in name or name.endswith("/"):
        name = str(PurePosixPath(name))  # "./cat.jpg" and "a//cat.jpg" are names that programs write
    endings = ("",) if is_picture(name) else ("", *PICTURE_SUFFIXES)
    return [f"{folder}{name}{ending}" for folder in folders for ending in endings]


def _plain(name: str) -> str:
    """Return a name in lower case, its accents one way: systems write them in two (Unicode's NFC and NFD)."""
    return unicodedata.normalize("NFC", name).lower()


def _in_other_letters(name: str, files: Mapping[str, str], folders: Sequence[str]) -> str:
    """Say which of the files, by their plain names, a picture that is not there may be.

    A name may have been written on another system, with backslashes, or begin with folders above this one.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    places = [_plain(place) for start in range(len(parts)) for place in _places("/".join(parts[start:]), folders)]
    found = next((files[place] for place in places if place in files), None)
    if not found:
        return ""
    accents = found.lower() != _plain(found) or name.lower() != _plain(name)
    return f", but {found} is{', its accents written another way (Unicode NFC or NFD)' if accents else ''}"


def _behind_a_link(name: str, links: Sequence[str]) -> str:
    """Say which of the links to folders a picture that is not there may lie behind."""
    above = PurePosixPath(name).parts[:1]
    link = next((link for link in links if link in above), next(iter(links), ""))
    return f", and {link} is a link to a folder, which is not followed" if link else ""


@dataclass
class _Reading:
    """The reading of a table.

    Args:
        table: The file.
        text: The caption's column, where it was named.
        folder: Of the pictures.
        files: What lies in that folder; None where that is not known.
        named: The pictures that its rows named.
        columns: Of picture and caption, as soon as they are known.
        complaint: That a row had no such columns.
    """

    table: Path
    text: str | None
    folder: Path
    files: Mapping[str, int] | None
    named: set[str] = field(default_factory=set)
    columns: tuple[str, str] | None = None
    complaint: DataError | None = None

    def add_to(self, rows: Rows) -> None:
        """Add the table's rows; those of another split are passed over, if not all are.

        Raises:
            DataError: The table cannot be read, or has no such columns.
        """
        for left_out in (True, False):
            for row in rows_of(self.table):
                if left_out and isinstance(row.fields, Mapping) and is_of_another(row.fields.get(SPLIT)):
                    self._name(row)
                    rows.skipped[ROW_LEFT_OUT] += 1
                else:
                    self._add(rows, row)
            if len(rows) or not rows.skipped.pop(ROW_LEFT_OUT, 0):
                break
        if self.columns is None and self.complaint:
            raise self.complaint

    def _add(self, rows: Rows, row: Row) -> None:
        """Add the records of a row: one for each caption, or one that is bad."""
        try:
            if row.fault:
                self._name(row)
                raise row.fault
            name, said = self._picture_and_words(row)
            places = self._places_of(name, row)
        except BadRecordError as error:
            rows.add_bad(error)
            return
        except DataError as error:  # a row without the columns; perhaps the others have them
            self.complaint = self.complaint or error
            message = f"{row.key}: the row has no picture and caption under the usual names"
            rows.add_bad(BadRecordError(WRONG_TEXT, message))
            return
        for caption in captions_in(said):
            try:
                rows.add(places[0], places, [("", checked_text(caption, f"{row.key} ({name[:200]})"))])
            except BadRecordError as error:
                rows.add_bad(error)

    def _name(self, row: Row) -> None:
        """Count the picture of a row that is not learnt from as named."""
        try:
            self._places_of(self._picture_and_words(row)[0], row)
        except DataError:  # it has none, or one that is not there: what is wrong with the row is known
            return

    def _picture_and_words(self, row: Row) -> tuple[str, object]:
        if not isinstance(row.fields, Mapping):
            raise BadRecordError(WRONG_TEXT, f"{row.key} is not an object with a picture and a caption")
        picture, caption = self.columns = self.columns or columns_of(row.fields, self.text, self.table)
        return picture_name(row.fields.get(picture), row.key), row.fields.get(caption)

    def _places_of(self, name: str, row: Row) -> list[str]:
        """Return where a row's picture may lie; the one place where that is known.

        Raises:
            BadRecordError: It is not there.
        """
        above = row.fields.get(_FOLDER_COLUMN)
        folders = [f"{above}/", *self._folders] if isinstance(above, str) and above else self._folders
        places = [place for written in dict.fromkeys((name, name.strip())) for place in _places(written, folders)]
        if self.files is None:
            return places
        if leaves_folder(name):
            self._name_whole_path(name)
            return places
        refuse_address(name, row.key)
        found = next((place for place in places if place in self.files), None)
        if found is None:
            alike = _in_other_letters(name, self._plain_names, self._folders) or _behind_a_link(name, self._links)
            raise BadRecordError(MISSING_PICTURE, f"{row.key}: the picture {name[:200]!r} is not there{alike}")
        self.named.add(found)
        return [found]

    @cached_property
    def _folders(self) -> tuple[str, ...]:
        """Where pictures may lie; the one folder that has any belongs to these, whatever its name."""
        above = {name.rpartition("/")[0] for name in self.files or () if is_picture(name)}
        return (*_FOLDERS, *(f"{folder}/" for folder in above if folder and len(above) == 1))

    def _name_whole_path(self, name: str) -> None:
        """Count a picture of the folder that is named by its whole path, which is told later, as named."""
        path, folder = Path(name), self.folder.absolute()
        if path.is_relative_to(folder):
            self.named.add(path.relative_to(folder).as_posix())

    @cached_property
    def _links(self) -> list[str]:
        """The folder's links to folders."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_symlink() and path.is_dir())

    @cached_property
    def _plain_names(self) -> Mapping[str, str]:
        return {_plain(file): file for file in self.files or ()}
