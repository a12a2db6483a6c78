"""Pictures with captions: a folder with a table, a table alone, or a text file beside each picture.

The table is `captions.csv`, `.tsv`, `.json` or `.jsonl` (or `metadata.*`, as hubs name it; Flickr8k's `captions.txt`,
Flickr30k's `results.csv`): a row for each picture, with a column for the file and one for the caption, or for a list of
some, under their usual names (`tables.py`). A picture no row names, a row without its picture and a text without its
picture are bad records: counted, not passed over in silence.
"""

import unicodedata
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath

from minigpt4.data.sources.formats import Place, Request
from minigpt4.data.sources.lists import ListSource, Rows, list_source, picture_name
from minigpt4.data.sources.safe_files import (
    MISSING_PICTURE,
    NO_PICTURE,
    NO_TEXT,
    PICTURE_SUFFIXES,
    WRONG_TEXT,
    BadRecordError,
    checked_text,
    files_in,
    files_of_split,
    is_other_split,
    is_picture,
    leaves_folder,
    refuse_address,
    skipped_rows,
)
from minigpt4.data.sources.tables import FILE_COLUMNS, SPLIT, Row, captions_in, columns_of, is_table, rows_of, table_in
from minigpt4.errors import DataError

_FOLDERS = ("", "images/", "image/")
_FOLDER_COLUMN = "filepath"
"""In Karpathy's lists of COCO: the folder of a row's picture."""


def sniff(place: Place) -> Path | None:
    """Return a folder with a table of captions in it or in one below, or with texts beside pictures; or a table."""
    if place.path.is_dir() and not place.deep:
        return place.path if table_in(place.path) is not None else None
    if place.deep and place.has(".parquet"):  # img2dataset leaves tables without pictures beside pictures with texts
        return place.path
    if (path := place.only_list) is not None and _is_list(path, place):
        return path
    if place.deep and not place.lists and (below := _folder_with_table(place.path)) is not None:
        return below
    return place.path if place.deep and place.has(*PICTURE_SUFFIXES) and place.has(".txt") else None


def _is_list(path: Path, place: Place) -> bool:
    if path.suffix.lower() in (".csv", ".tsv"):
        return True
    content = place.content
    if isinstance(content, dict):
        entries = list(content.values())
        named = bool(entries) and all(isinstance(entry, str | list) for entry in entries)
        if isinstance(content.get("images"), list) or named:
            return True
    return bool(place.keys.intersection(FILE_COLUMNS)) or (content is None and is_table(path))


def _folder_with_table(folder: Path) -> Path | None:
    """Return the one folder below that has a table, as hubs lay out splits."""
    below = [path for pattern in ("*/", "*/*/") for path in sorted(folder.glob(pattern)) if not path.is_symlink()]
    names, _ = files_of_split([path.relative_to(folder).as_posix() for path in below if table_in(path) is not None])
    if len(names) > 1:
        raise DataError(
            f"{folder} has tables of captions in {len(names)} folders: {', '.join(names[:8])}",
            "name each of them as a source of its own",
        )
    return folder / names[0] if names else None


def open_source(request: Request) -> ListSource:
    """Open pictures with captions: a folder, or a table."""
    path = request.path
    table = path if path.is_file() else table_in(path)
    folder = request.images or (path.parent if path.is_file() else path)
    files = {} if request.images and table else dict(files_in(folder))
    rows = Rows(request.count)
    if table is None:
        request.refuse("text", "captions in text files")
        _add_sidecars(rows, files)
    else:
        reading = _Reading(table, request.text, folder, None if request.images else files)
        reading.add_to(rows)
        for name in files if path.is_dir() else ():
            if is_picture(name) and name not in reading.named:
                rows.add_bad(BadRecordError(NO_TEXT, f"{name} has no caption, {table.name} does not name it"))
    sizes = sorted((name, size) for name, size in files.items() if is_picture(name))
    return list_source(request, table or path, folder, rows, sizes)


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


def _plain(name: str) -> str:
    """Return a name in lower case, its accents one way: systems write them in two (Unicode's NFC and NFD)."""
    return unicodedata.normalize("NFC", name).lower()


class _Reading:
    """The reading of a table.

    Args:
        table: The file.
        text: The caption's column, where it was named.
        folder: Of the pictures.
        files: What lies in that folder; None where that is not known.
    """

    def __init__(self, table: Path, text: str | None, folder: Path, files: Mapping[str, int] | None) -> None:
        self.table, self.text, self.folder, self.files = table, text, folder, files
        self.named: set[str] = set()
        """The pictures that its rows named."""
        self._columns: tuple[str, str] | None = None
        self._complaint: DataError | None = None

    def add_to(self, rows: Rows) -> None:
        """Add the table's rows; those of another split are passed over, if not all are.

        Raises:
            DataError: The table cannot be read, or has no such columns.
        """
        others = 0
        for row in rows_of(self.table):
            if isinstance(row.fields, Mapping) and is_other_split(row.fields.get(SPLIT)):
                others += 1
                self._name(row)
            else:
                self._add(rows, row)
        if others and not len(rows):
            for row in rows_of(self.table):
                self._add(rows, row)
        else:
            rows.skipped.update(skipped_rows(others))
        if self._columns is None and self._complaint:
            raise self._complaint

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
            self._complaint = self._complaint or error
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
        picture, caption = self._columns = self._columns or columns_of(row.fields, self.text, self.table)
        return picture_name(row.fields.get(picture), row.key), row.fields.get(caption)

    def _places_of(self, name: str, row: Row) -> list[str]:
        """Return where a row's picture may lie; the one place where that is known.

        Raises:
            BadRecordError: It is not there.
        """
        above = row.fields.get(_FOLDER_COLUMN)
        folders = (f"{above}/", *self._folders) if isinstance(above, str) and above else self._folders
        places = [place for written in dict.fromkeys((name, name.strip())) for place in _places(written, folders)]
        if self.files is None:
            return places
        if leaves_folder(name):
            path, folder = Path(name), self.folder.absolute()
            if path.is_relative_to(folder):  # reading it raises the error
                self.named.add(path.relative_to(folder).as_posix())
            return places
        refuse_address(name, row.key)
        found = next((place for place in places if place in self.files), None)
        if found is None:
            message = f"{row.key}: the picture {name[:200]!r} is not there{self._alike(name)}"
            raise BadRecordError(MISSING_PICTURE, message)
        self.named.add(found)
        return [found]

    @cached_property
    def _folders(self) -> tuple[str, ...]:
        """Where pictures may lie; the one folder that has any is among these, whatever its name."""
        above = {name.rpartition("/")[0] for name in self.files or () if is_picture(name)}
        return (*_FOLDERS, *(f"{folder}/" for folder in above if folder and len(above) == 1))

    def _alike(self, name: str) -> str:
        """Say which file a picture that is not there may be: its name has other letters, or folders above this one.

        Links to folders are not followed, and are reported.
        """
        parts = PurePosixPath(name.replace("\\", "/")).parts
        written = ["/".join(parts[start:]) for start in range(len(parts))]
        places = [_plain(place) for name in written for place in _places(name, self._folders)]
        if found := next((self._plain_names[place] for place in places if place in self._plain_names), None):
            return f", but {found} is"
        link = next((path.name for path in sorted(self.folder.iterdir()) if path.is_symlink() and path.is_dir()), None)
        return f", and {link} is a link to a folder, which is not followed" if link else ""

    @cached_property
    def _plain_names(self) -> Mapping[str, str]:
        return {_plain(file): file for file in self.files or ()}


def _places(name: str, folders: tuple[str, ...]) -> list[str]:
    """Return where the picture of a name may lie: an id stands for a file with the usual endings."""
    if "//" in name or "./" in name or name.endswith("/"):
        name = str(PurePosixPath(name))  # "./cat.jpg" and "a//cat.jpg" are names that programs write
    endings = ("",) if is_picture(name) else ("", *PICTURE_SUFFIXES)
    return [f"{folder}{name}{ending}" for folder in folders for ending in endings]
