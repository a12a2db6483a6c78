"""A source of tar shards: LAION, CC, SBU and whatever else img2dataset or webdataset wrote.

A folder of shards, one shard, or a pattern such as the original's `{00000..10488}.tar`. Samples are reached by
position, through the index file of the folder where there is one, else through an index made on opening.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np

from minigpt4.data.record import Record
from minigpt4.data.sources.formats import Place, Report, Request
from minigpt4.data.sources.safe_files import (
    DAMAGED,
    DOUBLED,
    LARGE_PICTURE,
    NO_PICTURE,
    NO_TEXT,
    BadRecordError,
    files_of_split,
)
from minigpt4.data.sources.shard_index import (
    INDEX_NAME,
    Shard,
    ShardIndex,
    again,
    make_index,
    part_of,
    read_index,
    refuse_stale,
    write_index,
)
from minigpt4.data.sources.tar_shards import (
    FAULT_DAMAGE,
    FAULT_DOUBLED,
    FAULT_LARGE,
    FAULT_NO_PICTURE,
    GOOD,
    MORE_DOTS,
    NOWHERE,
    TarReader,
    caption_of,
    sample_key,
)
from minigpt4.errors import DataError
from minigpt4.processing.pictures import DEFAULT_LIMITS
from minigpt4.text import counted

CAPTION_KEY = "caption"
MAX_SHARDS = 1_000_000
_BELOW = "shard in a folder below"
_AS_SOURCES = "name them as several sources"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")


@dataclass(frozen=True)
class ShardSource:
    """Samples of tar shards.

    Args:
        name: What a person calls it.
        index: Where they lie.
        caption_key: What holds the caption in a JSON record; another than the index was made with is possible.
        passed_over: Shards of the folder that are not read, by kind.
    """

    name: str
    index: ShardIndex
    caption_key: str
    passed_over: Mapping[str, int] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """A digest of names, sizes and places."""
        return self.index.identity + ("" if self.caption_key == self.index.caption_key else f"/{self.caption_key}")

    @property
    def text_lengths(self) -> Sequence[int] | None:
        """Bytes of each caption; None where the index was made for another key."""
        if self.caption_key != self.index.caption_key:
            return None
        return cast("Sequence[int]", self.index.rows["text_bytes"])

    @property
    def skipped(self) -> dict[str, int]:
        """Members, and shards, that were passed over, by kind."""
        return {**self.index.skipped, **self.passed_over}

    def __len__(self) -> int:
        return len(self.index.rows)

    def __getstate__(self) -> dict[str, object]:
        """Send a mapped index to another process as the name of its file."""
        state = dict(self.__dict__)
        if self.index.file:
            state["index"] = replace(self.index, rows=self.index.rows[:0].copy())
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        index = cast("ShardIndex", state["index"])
        self.__dict__.update(state, index=read_index(index.folder) if index.file else index)

    def group(self, number: int) -> str:
        """Return the name of a record's shard."""
        return self._shard(self.index.rows[number]).name

    def barren(self) -> list[str]:
        """Return the names of the shards that have samples, or are damaged, and of which the index knows none good."""
        if self.text_lengths is None:
            return []
        shards, faults = self.index.rows["shard"], self.index.rows["fault"]
        bad = np.setdiff1d(shards, shards[faults == GOOD])
        return [self.index.shards[int(number)].name for number in bad]

    def known_bad(self) -> list[int]:
        """Return the numbers of the records that are bad without being read."""
        return [int(number) for number in np.flatnonzero(self.index.rows["fault"] != GOOD)]

    def together(self) -> None:
        """Return None: a shard has one text for each picture."""

    def read(self, number: int, *, with_picture: bool = True) -> Record:
        """Return a sample, whose picture may be left out.

        Raises:
            BadRecordError: It has no picture or no caption, or the shard is damaged.
            DataError: The shard cannot be read, or is not the one that was indexed.
        """
        row = self.index.rows[number]
        shard = self._shard(row)
        if row["fault"] == FAULT_DAMAGE:
            raise BadRecordError(DAMAGED, self.index.damage.get(shard.name, f"{shard.name} is damaged"))
        path = self.index.folder / shard.name
        try:
            with path.open("rb") as file:
                return self._read(TarReader(file, shard.name), row, with_picture)
        except OSError as error:
            raise DataError(f"shard {path} cannot be read: {error.strerror}", "check the path and the disk") from error

    def _shard(self, row: np.void) -> Shard:
        if (number := int(row["shard"])) >= len(self.index.shards):
            raise DataError(
                f"the index of {self.name} speaks of shard {number}, it has {len(self.index.shards):,}",
                again(self.index.folder),
            )
        return self.index.shards[number]

    def _read(self, reader: TarReader, row: np.void, with_picture: bool) -> Record:
        picture, text = (
            None if row[part] == NOWHERE else reader.member_at(int(row[part])) for part in ("picture", "text")
        )
        named = picture or text
        key = f"{reader.name}:{sample_key(named.name)[0]}" if named else reader.name
        if row["fault"] == FAULT_DOUBLED:
            raise BadRecordError(DOUBLED, f"{key} stands twice in its shard")
        if picture is None or row["fault"] == FAULT_NO_PICTURE:
            raise BadRecordError(NO_PICTURE, f"{key} has no picture")
        if row["fault"] == FAULT_LARGE:
            limit = DEFAULT_LIMITS.max_bytes // 1024**2
            raise BadRecordError(
                LARGE_PICTURE, f"{key}: the picture has {picture.size:,} bytes, up to {limit} MiB are read"
            )
        if picture.size != row["picture_size"]:
            raise DataError(f"{key} is not what the index says", again(self.index.folder))
        if text is None:
            raise BadRecordError(NO_TEXT, f"{key} has no caption")
        if not picture.size:
            raise BadRecordError(NO_PICTURE, f"{key}: the picture is empty")
        caption = caption_of(reader, text.offset_data, text.size, key, self.caption_key if row["is_json"] else None)
        content = reader.read(picture.offset_data, picture.size) if with_picture else None
        return Record(key, content, (("", caption),))


def sniff(place: Place) -> Path | None:
    """Return a folder with tar files, a tar file, or a pattern of some."""
    return place.path if place.has(".tar") else None


def open_source(request: Request) -> ShardSource:
    """Open a folder of `*.tar`, one of them, or a pattern with braces.

    Raises:
        DataError: There are no shards or no samples in them, some of a pattern are missing, or the index is stale.
    """
    request.refuse("images", "its pictures in its shards")
    path, key = str(request.path), request.text or CAPTION_KEY
    folder, names, passed_over = find_shards(path)
    index = read_index(folder) if (folder / INDEX_NAME).is_file() else None
    is_whole = request.path.is_dir()
    # Shards that are named themselves may be none of the index: those for testing, which it leaves out.
    if index is None or (not is_whole and {shard.name for shard in index.shards}.isdisjoint(names)):
        index = make_index(folder, names, key, request.report)
    else:
        refuse_stale(index, names, is_whole)
        index = part_of(index, names)
    _refuse_nothing(path, index)
    return ShardSource(request.name, index, key, passed_over)


def index_folder(path: str, *, text: str | None = None, report: Report | None = None) -> tuple[Path, ShardIndex]:
    """Make the index of a folder of shards and write it there.

    Args:
        path: As for `open_source`.
        text: What holds the caption in a JSON record.
        report: Called after each shard.

    Returns:
        The index file and what it says; shards of the folder that are not read count as passed over.

    Raises:
        DataError: There are no shards or no samples in them, or one cannot be read.
        StorageError: The folder cannot be written.
    """
    folder, names, passed_over = find_shards(path)
    index = make_index(folder, names, text or CAPTION_KEY, report)
    _refuse_nothing(path, index)
    return write_index(index), replace(index, skipped={**index.skipped, **passed_over})


def _refuse_nothing(path: str, index: ShardIndex) -> None:
    if len(index.rows):
        return
    skipped = ", ".join(f"{count:,} x {what}" for what, count in index.skipped.items())
    hint = "name the folder of other shards"
    if MORE_DOTS in index.skipped:
        hint = "a sample's name ends at the first dot: write the shards with names that have one dot"
    raise DataError(
        f"{path} has {counted(len(index.shards), 'shard')} and not one sample in "
        f"{'it' if len(index.shards) == 1 else 'them'}, expected KEY.jpg with KEY.json or KEY.txt"
        + (f"; passed over: {skipped}" if skipped else ""),
        hint,
    )


def find_shards(path: str) -> tuple[Path, list[str], dict[str, int]]:
    """Find shards.

    Returns:
        Their folder, their names in it, in order, and how many of the folder are not read, by kind: those for testing,
        and those in folders below one that has some itself.

    Raises:
        DataError: There are none, or some of a pattern are missing.
    """
    given = Path(path)
    if "{" in path and not given.exists():
        paths = [Path(path) for path in expand_braces(path)]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise DataError(
                f"{len(missing):,} of {counted(len(paths), 'shard')} of {path} "
                f"{'is' if len(missing) == 1 else 'are'} missing, the first is {missing[0]}",
                "fetch them, or name the shards that are there: a folder stands for all in it",
            )
        folder = Path(os.path.commonpath([path.parent for path in paths]))
        return folder, [path.relative_to(folder).as_posix() for path in paths], {}
    if given.is_file():
        return given.parent, [given.name], {}
    if not given.is_dir():
        raise DataError(f"{path} is not a file or folder", "check the path")
    everywhere = sorted(given.rglob("*.tar"))
    found = [shard for shard in everywhere if shard.parent == given] or everywhere
    if not found:
        raise DataError(f"no tar shards in {path}", "name the folder that holds files like 00000.tar")
    names, skipped = files_of_split([shard.relative_to(given).as_posix() for shard in found])
    below = len(everywhere) - len(found)
    return given, names, skipped | ({_BELOW: below} if below else {})


def expand_braces(pattern: str) -> list[str]:
    """Expand `{00000..10488}` and `{a,b}` as a shell does.

    Raises:
        DataError: A brace that is neither, or more than `MAX_SHARDS` names.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    values = _values(match[1], pattern)
    rests = expand_braces(after)
    if (number := len(values) * len(rests)) > MAX_SHARDS:
        raise DataError(f"{pattern} names {number:,} shards, up to {MAX_SHARDS:,} are read", _AS_SOURCES)
    return sorted(f"{before}{value}{rest}" for rest in rests for value in values)


def _values(inside: str, pattern: str) -> Sequence[str]:
    if bounds := _RANGE.fullmatch(inside):
        first, last, width = int(bounds[1]), int(bounds[2]), len(bounds[1])
        if last < first or last - first >= MAX_SHARDS:
            raise DataError(
                f"{pattern} has the range {inside}, expected one that rises, of up to {MAX_SHARDS:,}",
                "write the lower number first" if last < first else _AS_SOURCES,
            )
        return [f"{number:0{width if bounds[1][0] == '0' else 0}}" for number in range(first, last + 1)]
    if "," in inside:
        return inside.split(",")
    raise DataError(
        f"{pattern} has {{{inside}}}, expected a range such as {{00000..00099}}, or names with commas",
        "name the folder instead: it stands for all shards in it",
    )
