"""The formats that examples may have: one table, known to recipes, the command line and the documentation.

A format is a row that names a module of this package with two functions: `sniff(place)`, which returns what is to be
opened if the format is there, and `open_source(request)`. `auto` goes through the table and takes the first format
whose sniff says yes, first by a folder's own files, then by those of the folders below. Nothing is ever run or fetched
because of a path, but for `hub:`. The readers are imported when they are used: `--help` reads this table.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast

from minigpt4.data.record import Source
from minigpt4.data.sources.safe_files import PICTURE_SUFFIXES, files_in
from minigpt4.errors import DataError

Report = Callable[[str, int, int], None]
"""Called with what is done, how many of it are, and of how many: 0 while that is not known."""

_PREFIX = "hub:"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:(//|(?=[^\\/]))", re.IGNORECASE)
_DRIVE = re.compile(r"[a-z]:", re.IGNORECASE)
_LISTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_PLAIN = (
    "expected a plain tar, in which samples are read by their place",
    "unpack it once (gunzip 00000.tar.gz makes 00000.tar): pictures take no more room unpacked",
)
_CURES = {
    (".xlsx", ".xls", ".ods"): "save {} as captions.csv",
    (".zip", ".7z", ".rar"): "unpack {} first",
}
_ENTRIES = 100
_FILES = 10_000


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Args:
        name: What a person calls it.
        path: Of the file or folder to open, or a pattern of shards.
        images: Where the pictures lie that a list names; None: beside it.
        text: Column or key of the caption; None: the usual ones.
        within: Links may lead anywhere in this folder; None: in that of the pictures.
        report: Called about what takes long.
    """

    name: str
    path: Path
    images: Path | None = None
    text: str | None = None
    within: Path | None = None
    report: Report | None = None

    @property
    def count(self) -> Callable[[int, int], None] | None:
        """What is called with the number of rows read, and of all."""
        return None if self.report is None else partial(self.report, f"reading {self.path.name}")

    def refuse(self, option: str, has: str) -> None:
        """Raise a `DataError` if an option was given that changes nothing, because of what the source has."""
        if getattr(self, option) is not None:
            raise DataError(f"{self.name} has {has}, so `{option}` changes nothing", f"leave {option} out")


@dataclass(frozen=True)
class Place:
    """What lies at a path, for formats to recognise themselves.

    Args:
        path: A file or a folder.
        files: Names of the files there, with `/`: the file's own; those of a folder; or, `deep`, the first ones of it
            and of all folders below.
        deep: Whether they are those of the folders below too, after no format was recognised without them.
    """

    path: Path
    files: Sequence[str]
    deep: bool = False

    def has(self, *endings: str) -> bool:
        """Return whether a file has one of some endings, in large or small letters."""
        return any(name.lower().endswith(endings) for name in self.files)

    @cached_property
    def lists(self) -> list[Path]:
        """The file, if it is a list or a text; with `deep` the folder's own lists."""
        if not self.path.is_dir():
            return [self.path] if self.has(*_LISTS, ".txt", ".token") else []
        return [self.path / name for name in self.files if self.deep and "/" not in name and self._is_list(name)]

    @property
    def only_list(self) -> Path | None:
        """The one list there; a table whose columns are not known is none where pictures have texts of their own."""
        from minigpt4.data.sources.tables import is_table

        if len(self.lists) != 1:
            return None
        (path,) = self.lists
        is_other = path.suffix.lower() in (".csv", ".tsv") and not is_table(path)
        return None if self.deep and is_other and self.has_pairs else path

    @cached_property
    def content(self) -> Any:  # noqa: ANN401  (whatever a file holds)
        """What the list holds: all of JSON, the first entries of JSON Lines, None of another file."""
        from minigpt4.data.sources.lists import read_json, read_json_lines

        path = self.only_list
        if path is None or path.suffix.lower() not in (".json", ".jsonl", ".ndjson"):
            return None
        if path.suffix.lower() == ".json":
            return read_json(path)
        return [item for _, item in islice(read_json_lines(path), _ENTRIES)]

    @cached_property
    def keys(self) -> set[str]:
        """The keys of the list's first entries, in small letters."""
        content = self.content
        if isinstance(content, dict):  # TextVQA's and TextCaps' data; else each value is an entry, as in GQA
            content = content["data"] if isinstance(content.get("data"), list) else list(content.values())
        entries = content[:_ENTRIES] if isinstance(content, list) else []
        return {str(key).lower() for entry in entries if isinstance(entry, dict) for key in entry}

    @cached_property
    def has_pairs(self) -> bool:
        """Whether a picture has a text file of its name."""
        names = [name.lower() for name in self.files]
        pictures = {name.rpartition(".")[0] for name in names if name.endswith(PICTURE_SUFFIXES)}
        return any(name.endswith(".txt") and name.removesuffix(".txt") in pictures for name in names)

    @staticmethod
    def _is_list(name: str) -> bool:
        return name.lower().endswith(_LISTS)


class Reader(Protocol):
    """A module that reads a format."""

    def sniff(self, place: Place) -> Path | None:
        """Return what is to be opened if the format is at a place: the path itself, or a list or folder in it."""

    def open_source(self, request: Request) -> Source:
        """Open a source.

        Raises:
            DataError: It is not there, is of another form, or cannot be read.
        """


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Args:
        module: Of this package, a `Reader`.
        files: What it reads, for people.
    """

    module: str
    files: str

    @property
    def reader(self) -> Reader:
        """The module, imported."""
        return cast("Reader", import_module(f"{__package__}.{self.module}"))


FORMATS = {
    "shards": Format("shards", "*.tar"),  # before parquet: img2dataset leaves both
    "parquet": Format("parquet", "*.parquet"),
    "alignment": Format("alignment", "filter_cap.json"),
    "conversations": Format("conversations", "a list of conversations"),
    "vqa": Format("questions", "a list of questions"),
    "captions": Format("captions", "captions.csv, .tsv, .json or .jsonl, or pictures with .txt"),
}
NAMES = ("auto", *FORMATS, "hub")
"""What a format may be called: `auto` looks, and so does `hub` in a data set of the Hugging Face hub."""


def open_source(
    path: str | PathLike[str],
    *,
    format: str = "auto",
    images: str | PathLike[str] | None = None,
    text: str | None = None,
    report: Report | None = None,
) -> Source:
    """Open a source of examples.

    Args:
        path: A folder, a file, a pattern of shards such as `{00000..10488}.tar`, or `hub:owner/name[@revision]`.
        format: One of `NAMES`.
        images: Where the pictures lie that a list names; left out: beside it.
        text: Column or key of the caption.
        report: Called about what takes long: reading lists, and shards that have no index; asking the hub.

    Raises:
        DataError: The path is not there, is nothing of the kind, or cannot be read.
        DownloadError: A data set of the hub cannot be had.
    """
    name, folder, within = str(path), None if images is None else Path(images), None
    if format not in NAMES:
        raise DataError(
            f"the format {format!r} is not known, expected {', '.join(NAMES)}",
            "leave it out and the source is recognised; a table (.csv, .tsv) is captions",
        )
    if format == "hub" or name.startswith(_PREFIX):
        from minigpt4.data.sources.hub import cache_of, dataset_folder

        place = dataset_folder(name.removeprefix(_PREFIX), report)
        within, format = cache_of(place), "auto" if format == "hub" else format
    else:
        _refuse_addresses(name)
        place = Path(name)
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder} is not a folder, expected that of the pictures", "mend --images, or `images`")
    if format == "auto":
        format, place = recognise(place)
    elif format != "shards" and not place.exists():
        raise _is_missing(place)
    return FORMATS[format].reader.open_source(Request(name, place, folder, text or None, within, report))


def recognise(path: Path) -> tuple[str, Path]:
    """Find a source's format by what is there.

    Returns:
        The format, and the path to open: the place itself, or the one list or folder in it.

    Raises:
        DataError: It is none of the formats.
    """
    if not path.exists() and path.suffix.lower() != ".tar":
        raise _is_missing(path)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder", "write what comes through it into a file first")
    for place in _places(path):
        for name, row in FORMATS.items():
            if (found := row.reader.sniff(place)) is not None:
                return name, found
    raise _no_source(path)


def _places(path: Path) -> Iterator[Place]:
    if not path.is_dir():
        yield Place(path, [path.name])
        return
    yield Place(path, sorted(entry.name for entry in path.iterdir()))
    yield Place(path, [name for name, _ in islice(files_in(path), _FILES)], deep=True)


def _is_missing(path: Path) -> DataError:
    return DataError(f"{path} does not exist", "check the path; relative ones start at the current folder")


def _refuse_addresses(path: str) -> None:
    """Refuse what names a command or a network: `pipe:curl ...`, `s3://...`."""
    match = _ADDRESS.match(path)
    if not match or Path(path).exists() or (_DRIVE.match(path) and match[1] != "//"):
        return
    raise DataError(
        f"{path[:80]!r} is an address or a command, and examples are read from this machine's disks",
        "fetch the files first, and name their folder",
    )


def _no_source(path: Path) -> DataError:
    """Say what a path lacks that is none of the formats."""
    expected = "expected " + ", ".join(f"{row.files} ({name})" for name, row in FORMATS.items())
    names = [path.name] if path.is_file() else [name for name, _ in islice(files_in(path), _FILES)]
    if not names:
        return DataError(f"{path} is an empty folder, {expected}", "name another folder")
    if any(name.lower().endswith(_COMPRESSED) for name in names):
        has = "is a compressed archive" if path.is_file() else "has compressed archives"
        return DataError(f"{path} {has}, {_PLAIN[0]}", _PLAIN[1])
    if path.is_dir() and all(name.lower().endswith(PICTURE_SUFFIXES) for name in names):
        return DataError(
            f"{path} has pictures and no words to them, expected captions.csv, .tsv, .json or .jsonl, or .txt files",
            "write captions.csv with the columns file_name and caption",
        )
    return DataError(f"{path} is not a source of examples, {expected}", _cure(path, names))


def _cure(path: Path, names: Sequence[str]) -> str:
    lists = [name for name in names if name.lower().endswith(_LISTS)]
    if path.is_dir() and (len(lists) > 1 or any("/" in name for name in lists)):
        named = f"{', '.join(lists[:4])}{', ...' if len(lists) > 4 else ''}"
        return f"name one of its lists ({named}), and the folder of the pictures (--images)"
    for endings, cure in _CURES.items():
        if found := next((name for name in names if name.lower().endswith(endings)), None):
            return cure.format(found)
    return "name its format, or another path"
