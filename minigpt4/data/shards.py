"""Reading tar shards of pictures with their records, by position.

Knows the webdataset layout (`KEY.jpg` followed by `KEY.json`) and nothing of what the records mean. The reader is our
own because the standard library's loops for ever on a crafted archive (CVE-2025-8194, Python before 3.11.14) and has
no random access: a shard is indexed once, then every sample is one seek.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.errors import DataError

BLOCK = 512
MAX_MEMBER_BYTES = 64 * 1024 * 1024
REGULAR = (b"0", b"\0")


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
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"no tar shards in {folder}", hint="name the folder that holds files like 00000.tar")
    return [sample for shard in shards for sample in index_shard(shard)]


def index_shard(shard: Path) -> list[Sample]:
    """List the samples of one shard in order; members that are neither `.jpg` nor `.json` are passed over.

    Raises:
        DataError: The archive is damaged, or a picture has no record or a record no picture.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in _members(shard):
        key, _, kind = name.rpartition("/")[2].partition(".")
        if kind in ("jpg", "json"):
            found.setdefault(key, {})[kind] = (offset, size)
    incomplete = [key for key, parts in found.items() if len(parts) != 2]
    if incomplete:
        raise DataError(f"{shard.name}: sample {incomplete[0]} has a picture or a record, expected both")
    return [Sample(shard, key, parts["jpg"], parts["json"]) for key, parts in found.items()]


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, data offset and size of every regular file; every step moves forward, so it ends."""
    end = shard.stat().st_size
    with shard.open("rb") as file:
        position = 0
        while position + BLOCK <= end:
            file.seek(position)
            header = file.read(BLOCK)
            if not header.strip(b"\0"):
                return
            size = _size(header, shard, position)
            data = position + BLOCK
            if data + size > end:
                raise DataError(f"{shard.name}: the member at byte {position} runs past the end of the file")
            if header[156:157] in REGULAR:
                yield _name(header, shard, position), data, size
            position = data + -(-size // BLOCK) * BLOCK


def _name(header: bytes, shard: Path, position: int) -> str:
    try:
        prefix, name = (header[at : at + n].split(b"\0")[0].decode() for at, n in ((345, 155), (0, 100)))
    except UnicodeDecodeError as error:
        raise DataError(f"{shard.name}: the name of the member at byte {position} is not UTF-8") from error
    return f"{prefix}/{name}" if prefix else name


def _size(header: bytes, shard: Path, position: int) -> int:
    """Read a member's size and check the header's sum, so that garbage is not taken for an archive."""
    try:
        size = int(header[124:136].split(b"\0")[0].strip() or b"0", 8)
        declared = int(header[148:156].split(b"\0")[0].strip(), 8)
    except ValueError as error:
        raise DataError(f"{shard.name}: no tar header at byte {position}") from error
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != declared:
        raise DataError(f"{shard.name}: the tar header at byte {position} is damaged")
    if not 0 <= size <= MAX_MEMBER_BYTES:
        raise DataError(f"{shard.name}: the member at byte {position} declares {size} bytes, up to 64 MiB are read")
    return size


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
