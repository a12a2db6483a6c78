"""Reading tar shards of pictures with their records, by position.

Knows the webdataset layout (`KEY.jpg` followed by `KEY.json`) and nothing of what the records mean. It is for shards
the project made itself, where anything out of order is an error; shards from elsewhere are `minigpt4.data.sources`'.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.data.sources.tar_shards import TarReader
from minigpt4.errors import DataError

MAX_MEMBER_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Sample:
    """Where a picture and its record lie.

    Args:
        shard: The tar file.
        key: The members' common name.
        picture: Offset and size of the picture, in bytes.
        record: Offset and size of the JSON record, in bytes.
    """

    shard: Path
    key: str
    picture: tuple[int, int]
    record: tuple[int, int]

    def read_picture(self) -> bytes:
        """Return the encoded picture."""
        return _read(self.shard, *self.picture)

    def read_record(self) -> dict[str, Any]:
        """Return the record.

        Raises:
            DataError: It is not a JSON object.
        """
        try:
            record = json.loads(_read(self.shard, *self.record))
        except ValueError as error:
            raise DataError(f"{self.shard.name}: the record of sample {self.key} is not JSON") from error
        if not isinstance(record, dict):
            raise DataError(f"{self.shard.name}: the record of sample {self.key} is not a JSON object")
        return record


def index_shards(folder: Path) -> list[Sample]:
    """List the samples of all `*.tar` files in a folder, by file name and position.

    Raises:
        DataError: No shards, or one that is damaged.
    """
    return [sample for shard in shards_in(folder) for sample in index_shard(shard)]


def shards_in(folder: Path) -> list[Path]:
    """Return the `*.tar` files in a folder, by name.

    Raises:
        DataError: There is none.
    """
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"no tar shards in {folder}", hint="name the folder that holds files like 00000.tar")
    return shards


def index_shard(shard: Path) -> list[Sample]:
    """List the samples of one shard in order; members that are neither `.jpg` nor `.json` are passed over.

    Raises:
        DataError: The archive is damaged, or a picture has no record or a record no picture.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with shard.open("rb") as file:
        for member in TarReader(file, shard.name):
            key, _, kind = member.name.rpartition("/")[2].partition(".")
            if member.size > MAX_MEMBER_BYTES:
                raise DataError(f"{shard.name}: {member.name} has {member.size:,} bytes, up to 64 MiB are read")
            if member.isreg() and kind in ("jpg", "json"):
                found.setdefault(key, {})[kind] = (member.offset_data, member.size)
    incomplete = [key for key, parts in found.items() if len(parts) != 2]
    if incomplete:
        raise DataError(f"{shard.name}: sample {incomplete[0]} has a picture or a record, expected both")
    return [Sample(shard, key, parts["jpg"], parts["json"]) for key, parts in found.items()]


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
