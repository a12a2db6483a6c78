"""The index of some tar shards: where each sample lies, in one file that is mapped and not read.

The file `minigpt4.index` beside the shards: one line of JSON (the shards with size and time, what was passed over,
what is damaged), blanks up to a multiple of 64 bytes, then 32 bytes for each sample (`tar_shards.ROW`). Five million
samples are 160 MB on disk and open in well under a second, since only what is asked for is read.

An index that does not fit its shards any more is refused, never mended behind one's back.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.data.sources.formats import Report
from minigpt4.data.sources.tar_shards import GOOD, ROW, look_through
from minigpt4.errors import DataError
from minigpt4.weights.files.atomic import write_file

INDEX_NAME = "minigpt4.index"
FORMAT = "minigpt4 shard index 1"
MAX_HEADER_BYTES = 256 * 1024**2
_ALIGNMENT = 64


@dataclass(frozen=True)
class Shard:
    """A shard as it was when it was indexed: its name relative to the index's folder, its size, its time of change."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of some shards lie.

    Args:
        folder: Holds the shards.
        shards: In order; a row's `shard` is a number in this list.
        rows: An array of `ROW`.
        caption_key: What holds the caption in a JSON record.
        skipped: Members passed over, by kind.
        damage: What ends a shard too early, by its name.
        identity: A digest of names, sizes and places.
        file: The index file that `rows` is mapped from; None where it was made in memory.
    """

    folder: Path
    shards: tuple[Shard, ...]
    rows: np.ndarray
    caption_key: str
    skipped: dict[str, int]
    damage: dict[str, str]
    identity: str
    file: Path | None = None

    @property
    def bad(self) -> int:
        """How many samples are known to be bad."""
        return int(np.count_nonzero(self.rows["fault"] != GOOD))


def make_index(folder: Path, names: Sequence[str], caption_key: str, report: Report | None = None) -> ShardIndex:
    """Read through shards and list their samples.

    Raises:
        DataError: A shard cannot be read at all; damage within one is noted.
    """
    shards, parts = [], [np.zeros(0, ROW)]
    skipped: Counter[str] = Counter()
    damage: dict[str, str] = {}
    for number, name in enumerate(names):
        shards.append(_as_it_is(folder, name))
        contents = look_through(folder / name, caption_key)
        contents.rows["shard"] = number
        parts.append(contents.rows)
        skipped.update(contents.skipped)
        if contents.damage:
            damage[name] = contents.damage
        if report:
            report("reading shards", number + 1, len(names))
    rows = np.concatenate(parts)
    identity = _identity(shards, rows, caption_key)
    return ShardIndex(folder, tuple(shards), rows, caption_key, dict(skipped), damage, identity)


def write_index(index: ShardIndex) -> Path:
    """Write an index beside its shards; return the file."""
    header = {
        "format": FORMAT,
        "samples": len(index.rows),
        "bad": index.bad,
        "caption_key": index.caption_key,
        "identity": index.identity,
        "skipped": index.skipped,
        "damage": index.damage,
        "shards": [astuple(shard) for shard in index.shards],
    }
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n"
    target = index.folder / INDEX_NAME
    with write_file(target) as file:
        file.write(line)
        file.write(index.rows.view(np.uint8).data)
    return target


def read_index(folder: Path) -> ShardIndex:
    """Map the index of a folder.

    Raises:
        DataError: The file is not an index, or is cut short.
    """
    path = folder / INDEX_NAME
    try:
        with path.open("rb") as file:
            line = file.readline(MAX_HEADER_BYTES)
        header = json.loads(line)
        samples = int(header["samples"])
        if header["format"] != FORMAT or path.stat().st_size != len(line) + samples * ROW.itemsize:
            raise ValueError
        return ShardIndex(
            folder=folder,
            shards=tuple(Shard(str(name), int(size), int(time)) for name, size, time in header["shards"]),
            rows=np.memmap(path, ROW, "r", len(line), samples) if samples else np.zeros(0, ROW),
            caption_key=str(header["caption_key"]),
            skipped={str(what): int(count) for what, count in header["skipped"].items()},
            damage={str(name): str(what) for name, what in header["damage"].items()},
            identity=str(header["identity"]),
            file=path,
        )
    except OSError as error:
        raise DataError(f"the index {path} cannot be read: {error.strerror}", again(folder)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not an index of this version, or it is damaged", again(folder)) from error


def refuse_stale(index: ShardIndex, names: Sequence[str], is_whole: bool) -> None:
    """Refuse an index that does not know some shards as they are now, or of a whole folder, knows others.

    Raises:
        DataError: It is stale.
    """
    known, wanted = {shard.name: shard for shard in index.shards}, set(names)
    wrong = [f"does not know {name}" for name in names if name not in known]
    wrong += [
        f"was made before {name} changed"
        for name in names
        if name in known and known[name] != _as_it_is(index.folder, name)
    ]
    wrong += [f"knows {name}, which is gone" for name in known if is_whole and name not in wanted]
    if wrong:
        others = f" and {len(wrong) - 1:,} others" if len(wrong) > 1 else ""
        raise DataError(f"the index {index.folder / INDEX_NAME} is stale: it {wrong[0]}{others}", again(index.folder))


def part_of(index: ShardIndex, names: Sequence[str]) -> ShardIndex:
    """Return the part of an index that is about some of its shards; the index itself where these are all."""
    wanted = set(names)
    if wanted == {shard.name for shard in index.shards}:
        return index
    numbers = [number for number, shard in enumerate(index.shards) if shard.name in wanted]
    rows = np.array(index.rows[np.isin(index.rows["shard"], numbers)])
    rows["shard"] = np.searchsorted(numbers, rows["shard"])
    shards = tuple(index.shards[number] for number in numbers)
    damage = {name: what for name, what in index.damage.items() if name in wanted}
    return replace(
        index,
        shards=shards,
        rows=rows,
        damage=damage,
        identity=_identity(shards, rows, index.caption_key),
        file=None,
    )


def _as_it_is(folder: Path, name: str) -> Shard:
    try:
        status = (folder / name).stat()
    except OSError as error:
        raise DataError(f"shard {folder / name} cannot be read: {error.strerror}", "check the path") from error
    return Shard(name, status.st_size, status.st_mtime_ns)


def _identity(shards: Sequence[Shard], rows: np.ndarray, caption_key: str) -> str:
    """Digest names, sizes and places; times are left out, so that a copy of a folder is the same source."""
    described: list[Any] = [caption_key, *([shard.name, shard.size] for shard in shards)]
    digest = hashlib.sha256(json.dumps(described).encode())
    digest.update(rows.view(np.uint8).data)
    return digest.hexdigest()


def again(folder: Path) -> str:
    """Return the command that makes an index again."""
    return f"minigpt4 data index {folder}"
