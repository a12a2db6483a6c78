"""Which samples a tar shard holds: the webdataset layout that img2dataset writes.

A sample is the members of one name up to the first dot of its last part: a picture (`KEY.jpg`, `.jpeg`, `.png`,
`.webp`, `.gif`, `.bmp`) and its caption, in `KEY.json` under a key or as `KEY.txt`. Where both are there the JSON's
counts, as in the original; the text is taken where the JSON has no such key. All other members are passed over and
counted: nothing is ever unpacked, unpickled or followed.

A shard that is damaged keeps the samples before the damage; the damage itself is one bad row, so that it is counted
and a shard with nothing good in it is noticed.

Knows one shard at a time; the index of many and their records are in `shards`.
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from minigpt4.data.sources.safe_files import (
    LARGE_TEXT,
    NO_TEXT,
    PICTURE_SUFFIXES,
    WRONG_TEXT,
    BadRecordError,
    checked_text,
    decoded_text,
    text_bytes,
)
from minigpt4.errors import DataError
from minigpt4.processing.pictures import DEFAULT_LIMITS

MAX_HEADER_BYTES = 32 * 1024
"""Of all headers of one member; names end at a few hundred bytes, and the library's memory grows with the square."""
MAX_MEMBERS = 10_000_000
"""Of one archive; where they lie is held in memory while it is indexed."""
MAX_JSON_BYTES = 1024**2
"""Of a sample's JSON record, which holds more than the caption: address, size, Exif."""

ROW = np.dtype(
    [
        ("picture", "<u8"),  # where the picture's first header lies, in bytes; NOWHERE: it has none
        ("text", "<u8"),  # where the first header of the caption's member lies
        ("picture_size", "<u4"),
        ("text_bytes", "<u4"),  # of the caption itself
        ("shard", "<u4"),
        ("fault", "u1"),
        ("is_json", "u1"),
        ("padding", "V2"),
    ]
)
"""One sample of an index, 32 bytes."""
NOWHERE = 2**64 - 1
GOOD, FAULT_NO_PICTURE, FAULT_TEXT, FAULT_DOUBLED, FAULT_LARGE, FAULT_DAMAGE = range(6)

MORE_DOTS = "picture or text with a dot before its ending"
"""`a.b.jpg` is part `b.jpg` of the sample `a`, by webdataset's rule."""

_KINDS = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.DIRTYPE: "folder",
    tarfile.FIFOTYPE: "named pipe",
}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_HINT = "fetch or write the archive again"


class TarReader:
    """Members of a tar archive, read by position: never extracted, no link followed.

    The standard library parses the headers. Its own loop over members is not used: it takes damage for the archive's
    end, keeps all members in memory, and hostile headers lead it backwards (CVE-2025-8194).

    Args:
        file: The archive, opened for reading bytes.
        name: Of the archive, for complaints.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name, self.end = file, name, file.seek(0, os.SEEK_END)
        self.after = 0
        """Where the header behind the last member read lies."""
        self._headers = _Headers(file)
        self._library = _Library(fileobj=self._headers, encoding="utf-8", errors="backslashreplace")

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield the members in order.

        Raises:
            DataError: The archive is damaged, with the place; the members before it were yielded.
        """
        if not self.end:
            raise DataError(f"{self.name}: the file is empty, expected a tar archive", _HINT)
        self.file.seek(0)
        begins = self.file.read(max(map(len, _COMPRESSED)))
        if program := next((_COMPRESSED[magic] for magic in _COMPRESSED if begins.startswith(magic)), None):
            raise DataError(
                f"{self.name}: the archive is compressed by {program}, expected a plain tar", "unpack it once"
            )
        self.after = 0
        for _ in range(MAX_MEMBERS):
            if (member := self.member_at(self.after)) is None:
                return
            yield member
        raise DataError(f"{self.name}: more than {MAX_MEMBERS:,} members", "write several archives")

    def member_at(self, position: int) -> tarfile.TarInfo | None:
        """Read the member whose first header lies at a position; None where the archive's end mark lies.

        Raises:
            DataError: No header lies there, it is damaged, or the member runs past the end of the file.
        """
        self.file.seek(position)
        if self.file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
            return None
        self.file.seek(position)
        self._headers.left = MAX_HEADER_BYTES
        self._library.pax_headers = {}  # global ones add up
        try:
            member = tarfile.TarInfo.fromtarfile(self._library)
        except (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            what = f"no tar header at byte {position}: {error}"
            if position >= self.end:
                what = "the file ends without an end mark, so it may be cut short"
            elif "checksum" in str(error):
                what = f"the tar header at byte {position} is damaged"
            raise DataError(f"{self.name}: {what}", _HINT) from error
        self.after = self._library.offset
        size = member.size if member.isreg() else 0
        if size < 0 or member.offset_data + size > self.end or self.after <= position:
            raise DataError(f"{self.name}: the member at byte {position} runs past the end of the file", _HINT)
        return member

    def read(self, start: int, size: int) -> bytes:
        """Return the content of a member."""
        self.file.seek(start)
        return self.file.read(size)


class _Headers(io.RawIOBase):
    """A file of which the headers of a member take up to `MAX_HEADER_BYTES`: they may claim any size."""

    def __init__(self, file: BinaryIO) -> None:
        self.left = 0
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"its headers have more than {MAX_HEADER_BYTES // 1024} KiB")
        return self._file.read(size)

    def tell(self) -> int:
        return self._file.tell()


class _Library(tarfile.TarFile):
    def next(self) -> None:
        """Read no member: the constructor would."""


class _Part(NamedTuple):
    """Where a member lies: its first header, its content, and the size of that, in bytes."""

    start: int
    data: int
    size: int


@dataclass(slots=True)
class _Parts:
    picture: _Part | None = None
    json: _Part | None = None
    txt: _Part | None = None
    doubled: bool = False


@dataclass
class Contents:
    """What one shard holds.

    Args:
        rows: An array of `ROW`, in order of the samples' first members; the shard's number is not set.
        skipped: Members passed over, by kind.
        damage: What ends the shard too early; empty where nothing does.
    """

    rows: np.ndarray
    skipped: Counter[str]
    damage: str = ""


def look_through(shard: Path, caption_key: str) -> Contents:
    """List the samples of one shard.

    Args:
        shard: The tar file.
        caption_key: What holds the caption in a JSON record.

    Raises:
        DataError: The file cannot be read.
    """
    found: dict[str, _Parts] = {}
    skipped: Counter[str] = Counter()
    damage = ""
    try:
        with shard.open("rb") as file:
            reader = TarReader(file, shard.name)
            try:
                for member in reader:
                    if (reason := _add(member, found)) is not None:
                        skipped[reason] += 1
            except DataError as error:
                damage = error.message
            ended = reader.after
            rows = [_row(reader, parts, caption_key) for parts in found.values()]
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {error.strerror}", "check the path and permissions") from error
    if damage:
        rows.append((ended, NOWHERE, 0, 0, 0, FAULT_DAMAGE, 0, b""))
    return Contents(np.array(rows, ROW), skipped, damage)


def sample_key(name: str) -> tuple[str, str]:
    """Split a member's name into the sample's key and the rest, at the first dot of the name's last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def caption_of(reader: TarReader, start: int, size: int, key: str, caption_key: str | None) -> str:
    """Read a sample's caption, from under a key of its JSON record, or from its text.

    Raises:
        BadRecordError: It is not what the layout promises.
    """
    if size > MAX_JSON_BYTES:
        raise BadRecordError(
            LARGE_TEXT, f"{key}: its text file has {size:,} bytes, up to {MAX_JSON_BYTES // 1024} KiB are read"
        )
    content = reader.read(start, size)
    if caption_key is None:
        return decoded_text(content, key)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        said = "is nested too deep" if isinstance(error, RecursionError) else "cannot be read"
        raise BadRecordError(WRONG_TEXT, f"{key}: its JSON {said}") from error
    if not isinstance(record, dict):
        raise BadRecordError(WRONG_TEXT, f"{key}: its JSON is not an object")
    if caption_key not in record:
        shown = ", ".join(sorted(record)[:8])[:200]
        raise BadRecordError(
            NO_TEXT, f"{key}: its JSON has no {caption_key!r}, but {shown or 'nothing'}; name one with `text`"
        )
    return checked_text(record[caption_key], key)


def _add(member: tarfile.TarInfo, found: dict[str, _Parts]) -> str | None:
    """Put a member where it belongs; return what it is where it belongs to no sample."""
    if member.issparse():
        return "sparse file"
    if member.type not in tarfile.REGULAR_TYPES:
        return _KINDS.get(member.type, "member of an unknown kind")
    key, suffix = sample_key(member.name)
    *dotted, ending = suffix.split(".")
    if not key or key.endswith("/"):
        return "hidden file"
    if f".{suffix}" in PICTURE_SUFFIXES:
        part = "picture"
    elif suffix in ("json", "txt"):
        part = suffix
    elif dotted and (f".{ending}" in PICTURE_SUFFIXES or ending in ("json", "txt")):
        return MORE_DOTS
    else:
        return f"file of kind .{suffix}" if suffix.isascii() and suffix.isalnum() and len(suffix) < 8 else "other file"
    parts = found.setdefault(key, _Parts())
    if getattr(parts, part) is not None:
        parts.doubled = True
    else:
        setattr(parts, part, _Part(member.offset, member.offset_data, member.size))
    return None


def _row(reader: TarReader, parts: _Parts, caption_key: str) -> tuple[int | bytes, ...]:
    picture, text, length, fault = parts.picture, parts.json or parts.txt, 0, FAULT_DOUBLED
    if not parts.doubled:
        text, length = _measured(reader, parts, caption_key)
        fault = GOOD if length else FAULT_TEXT
        if fault == GOOD and picture is None:
            fault = FAULT_NO_PICTURE
        elif fault == GOOD and picture is not None and picture.size > DEFAULT_LIMITS.max_bytes:
            fault = FAULT_LARGE
    return (
        picture.start if picture else NOWHERE,
        text.start if text else NOWHERE,
        min(picture.size, 2**32 - 1) if picture else 0,
        length,
        0,
        fault,
        int(text is not None and text is parts.json),
        b"",
    )


def _measured(reader: TarReader, parts: _Parts, caption_key: str) -> tuple[_Part | None, int]:
    """Choose the member that holds the caption; return it with the caption's bytes, 0 where it cannot be read."""
    candidates = [part for part in (parts.json, parts.txt) if part]
    for part in candidates:
        try:
            caption = caption_of(reader, part.data, part.size, "", caption_key if part is parts.json else None)
            return part, text_bytes(caption)
        except BadRecordError as error:
            if error.kind != NO_TEXT:
                return part, 0
    return (candidates[0] if candidates else None), 0
