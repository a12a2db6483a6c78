"""Opening a source of examples: which reader a path belongs to.

`auto` recognises a source by what is there: endings, names and the first entries of a list; what it looked for stands
in its complaint. Nothing is ever run or fetched because of a path, but for `hub:`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from minigpt4.data.record import Source
from minigpt4.data.sources.alignment import LIST_NAME, open_alignment
from minigpt4.data.sources.captions import open_captions
from minigpt4.data.sources.conversations import TURNS, open_conversations
from minigpt4.data.sources.guarded_folder import PICTURE_SUFFIXES, files_in
from minigpt4.data.sources.hub import PREFIX, cache_of, dataset_folder
from minigpt4.data.sources.listed import Count, ListSource, read_json, read_json_lines
from minigpt4.data.sources.parquet import ParquetSource, open_parquet
from minigpt4.data.sources.questions import open_questions
from minigpt4.data.sources.shard_index import Report
from minigpt4.data.sources.shards import open_shards
from minigpt4.data.sources.splits import training_files
from minigpt4.data.sources.tables import FILE_COLUMNS, is_table, table_in
from minigpt4.errors import DataError

Format = Literal["auto", "shards", "captions", "alignment", "conversations", "vqa", "parquet", "hub"]
"""What a source may be."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:(//|(?=[^\\/]))", re.IGNORECASE)
_DRIVE = re.compile(r"[a-z]:", re.IGNORECASE)
_LISTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
_TEXTS = (".txt", ".token")
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_SHEETS, _ZIPS = (".xlsx", ".xls", ".ods"), (".zip", ".7z", ".rar")
_PLAIN = (
    "expected a plain tar, in which samples are read by their place",
    "unpack it once (gunzip 00000.tar.gz makes 00000.tar): pictures take no more room unpacked",
)
_LOOKED_AT = 100
_LOOKED_THROUGH = 10_000
_EXPECTED = (
    "expected *.tar (shards), filter_cap.json (alignment), captions.csv, .tsv, .json or .jsonl, or pictures with .txt"
    " (captions), *.parquet, or a list of conversations or questions"
)


class CheckableSource(Source, Protocol):
    """A source that knows, without reading, some of what is wrong with it."""

    @property
    def skipped(self) -> dict[str, int]:
        """What was passed over, by kind."""

    def known_bad(self) -> Sequence[int]:
        """Numbers of the records that are bad without being read."""


def open_source(
    path: str | PathLike[str],
    *,
    format: str = "auto",
    images: str | PathLike[str] | None = None,
    text: str | None = None,
    report: Report | None = None,
) -> CheckableSource:
    """Open a source of examples.

    Args:
        path: A folder, a file, a pattern of shards such as `{00000..10488}.tar`, or `hub:owner/name[@revision]`.
        format: One of `Format`; `auto` looks.
        images: Where the pictures lie that a list names; left out: beside it.
        text: Column or key of the caption.
        report: Told what takes long: reading lists, and shards that have no index; asking the hub.

    Returns:
        The source.

    Raises:
        DataError: The path is not there, is nothing of the kind, or cannot be read.
        DownloadError: A data set of the hub cannot be had.
    """
    name, folder = str(path), None if images is None else Path(images)
    if format not in get_args(Format):
        raise DataError(
            f"the format {format!r} is not known, expected {', '.join(get_args(Format))}",
            "leave it out and the source is recognised; a table (.csv, .tsv) is captions",
        )
    within = None
    if format == "hub" or name.startswith(PREFIX):
        place = dataset_folder(name, report)
        within, format = cache_of(place), "auto" if format == "hub" else format
    else:
        _refuse_addresses(name)
        place = Path(name)
    if folder is not None and not folder.is_dir():
        raise DataError(f"{folder} is not a folder, expected that of the pictures", "mend --images, or `images`")
    kind, place = recognise(place) if format == "auto" else (format, place)
    _refuse_what_changes_nothing(kind, name, images=folder is not None, text=text is not None)
    if kind == "shards":
        return replace(open_shards(str(place), text=text, report=report), name=name)
    if not place.exists():
        raise DataError(f"{name} does not exist", "check the path; relative ones start at the current folder")
    count = None if report is None else partial(report, f"reading {place.name}")
    return replace(_open(kind, place, folder, text, within, count), name=name)


def _refuse_what_changes_nothing(kind: str, name: str, *, images: bool, text: bool) -> None:
    if images and kind == "shards":
        raise DataError(f"{name} has its pictures in its shards, so `images` changes nothing", "leave images out")
    if text and kind in ("conversations", "vqa"):
        words = "the turns of its conversations" if kind == "conversations" else "questions and answers"
        raise DataError(f"{name} has {words} and no captions, so `text` changes nothing", "leave text out")


def _open(
    kind: str, place: Path, images: Path | None, text: str | None, within: Path | None, count: Count | None
) -> ListSource | ParquetSource:
    match kind:
        case "conversations":
            return open_conversations(_the_list(place), images=images, within=within, count=count)
        case "vqa":
            return open_questions(place, images=images, within=within, count=count)
        case "parquet":
            return open_parquet(place, images=images, text=text, within=within, count=count)
        case "alignment":
            return open_alignment(place, images=images, text=text, within=within, count=count)
        case _:
            return open_captions(place, images=images, text=text, within=within, count=count)


def recognise(place: Path) -> tuple[str, Path]:
    """Tell a source's format by what is there.

    Returns:
        The format, and the path to open: the place itself, or the one list of a folder.

    Raises:
        DataError: It is none of the formats.
    """
    if place.is_dir():
        return _of_folder(place)
    if place.suffix.lower() == ".tar":
        return "shards", place
    if not place.exists():
        raise DataError(f"{place} does not exist", "check the path; relative ones start at the current folder")
    if not place.is_file():
        raise DataError(f"{place} is neither a file nor a folder", "write what comes through it into a file first")
    suffix = place.suffix.lower()
    if place.name.lower().endswith(_PACKED):
        raise DataError(f"{place} is a compressed archive, {_PLAIN[0]}", _PLAIN[1])
    kind = "parquet" if suffix == ".parquet" else _of_list(place) if suffix in (*_LISTS, *_TEXTS) else None
    if kind:
        return kind, place
    raise DataError(f"{place} is not a source of examples, {_EXPECTED}", "name its format")


def _of_folder(folder: Path) -> tuple[str, Path]:
    names = {path.name for path in folder.iterdir()}
    if any(name.endswith(".tar") for name in names):  # before parquet: img2dataset leaves both
        return "shards", folder
    if LIST_NAME in names:
        return "alignment", folder
    if table_in(folder) is not None:
        return "captions", folder
    if any("question" in name.lower() and name.endswith(".json") for name in names):
        return "vqa", folder
    return _of_what_lies_deeper(folder, names)


def _of_what_lies_deeper(folder: Path, names: Collection[str]) -> tuple[str, Path]:
    """Tell the format of a folder whose own files, by their `names`, do not say it at once."""
    files = [name for name, _ in islice(files_in(folder), _LOOKED_THROUGH)]
    deeper = [name.lower() for name in files]
    if any(name.endswith(".tar") for name in deeper):
        return "shards", folder
    if any(name.endswith(".parquet") for name in deeper):
        # Writing plain files, img2dataset leaves tables without pictures beside pictures with their texts.
        return "captions" if _has_pairs(deeper) else "parquet", folder
    lists = [folder / name for name in sorted(names) if name.lower().endswith(_LISTS)]
    others = [path for path in lists if path.suffix.lower() in (".csv", ".tsv") and not is_table(path)]
    if len(lists) == 1 and not (others and _has_pairs(deeper)) and (listed := _of_list(lists[0])):
        return listed, lists[0]
    if not lists and (below := _with_table(folder)):
        return "captions", below
    if any(name.endswith(PICTURE_SUFFIXES) for name in deeper) and any(name.endswith(".txt") for name in deeper):
        return "captions", folder
    raise _no_source(folder, files)


def _with_table(folder: Path) -> Path | None:
    """Return the folder below that has a table of captions, as hubs lay out splits; those for testing are none.

    Raises:
        DataError: Several have one.
    """
    below = [path for pattern in ("*/", "*/*/") for path in sorted(folder.glob(pattern)) if not path.is_symlink()]
    names = training_files([path.relative_to(folder).as_posix() for path in below if table_in(path) is not None])
    if len(names) > 1:
        raise DataError(
            f"{folder} has tables of captions in {len(names)} folders: {', '.join(names[:8])}",
            "name each of them as a source of its own",
        )
    return folder / names[0] if names else None


def _has_pairs(names: Sequence[str]) -> bool:
    pictures = {name.rpartition(".")[0] for name in names if name.endswith(PICTURE_SUFFIXES)}
    return any(name.endswith(".txt") and name.removesuffix(".txt") in pictures for name in names)


def _no_source(folder: Path, names: Sequence[str]) -> DataError:
    """Say what a folder lacks; `names` are those of its files."""
    lower = [name.lower() for name in names]
    if not names:
        return DataError(f"{folder} is an empty folder, {_EXPECTED}", "name another folder")
    if all(name.endswith(PICTURE_SUFFIXES) for name in lower):
        return DataError(
            f"{folder} has pictures and no words to them, expected captions.csv, .tsv, .json or .jsonl, or .txt files",
            "write captions.csv with the columns file_name and caption",
        )
    if any(name.endswith(_PACKED) for name in lower):
        return DataError(f"{folder} has compressed archives, {_PLAIN[0]}", _PLAIN[1])
    return DataError(f"{folder} is not a source of examples, {_EXPECTED}", _cure_of_folder(names))


def _cure_of_folder(names: Sequence[str]) -> str:
    lists = [name for name in names if name.lower().endswith(_LISTS)]
    if len(lists) > 1 or any("/" in name for name in lists):
        named = f"{', '.join(lists[:4])}{', ...' if len(lists) > 4 else ''}"
        return f"name one of its lists ({named}), and the folder of the pictures (--images)"
    for endings, cure in ((_SHEETS, "save {} as captions.csv"), (_ZIPS, "unpack {} first")):
        if found := next((name for name in names if name.lower().endswith(endings)), None):
            return cure.format(found)
    return "name its format, or another folder"


def _of_list(path: Path) -> str | None:
    """Tell what a list is about by its first entries."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return "captions"
    if suffix in _TEXTS:
        return "captions" if is_table(path) else None
    if suffix != ".json":
        return _of_entries([item for _, item in islice(read_json_lines(path), _LOOKED_AT)])
    content = read_json(path)
    if isinstance(content, dict):
        return _of_object(content)
    return _of_entries(content[:_LOOKED_AT]) if isinstance(content, list) else None


def _of_object(content: Mapping[str, Any]) -> str | None:
    if "questions" in content:
        return "vqa"
    if "annotations" in content:
        return "captions" if "images" in content else "alignment"
    entries = list(islice(content.values(), _LOOKED_AT))
    if isinstance(content.get("data"), list):  # TextVQA, TextCaps
        return _of_entries(content["data"][:_LOOKED_AT])
    if isinstance(content.get("images"), list) or (entries and all(isinstance(entry, str | list) for entry in entries)):
        return "captions"
    return _of_entries(entries)


def _of_entries(entries: Sequence[object]) -> str | None:
    keys = {str(key).lower() for entry in entries if isinstance(entry, dict) for key in entry}
    if keys.intersection(TURNS):
        return "conversations"
    if "question" in keys:
        return "vqa"
    return "captions" if keys.intersection(FILE_COLUMNS) else None


def _the_list(place: Path) -> Path:
    """Return a list of conversations: the file itself, or the one list of a folder."""
    if place.is_file():
        return place
    found = sorted([*place.glob("*.json"), *place.glob("*.jsonl")])
    if len(found) != 1:
        raise DataError(f"{place} has {len(found)} JSON lists, expected one", "name the list itself")
    return found[0]


def _refuse_addresses(path: str) -> None:
    """Refuse what names a command or a network: `pipe:curl ...`, `s3://...`."""
    match = _ADDRESS.match(path)
    if not match or Path(path).exists() or (_DRIVE.match(path) and match[1] != "//"):
        return
    raise DataError(
        f"{path[:80]!r} is an address or a command, and examples are read from this machine's disks",
        "fetch the files first, and name their folder",
    )
