"""Which samples a tar shard holds: the webdataset layout that img2dataset writes.

A sample is the members of one name up to the first dot of its last part: a picture (`KEY.jpg`, `.jpeg`, `.png`,
`.webp`, `.gif`, `.bmp`) and its caption, in `KEY.json` under a key or as `KEY.txt`. Where both are there the JSON's
counts, as in the original; the text is taken where the JSON has no such key. All other members are passed over and
counted: nothing is ever unpacked, unpickled or followed.

A shard that is damaged keeps the samples before the damage; the damage itself is one bad row, so that it is counted
and a shard with nothing good in it is noticed.

Knows one shard at a time; files of indexes are `shard_index`'s, records are `shards`'.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minigpt4.data.sources.faults import LARGE_TEXT, NO_TEXT, WRONG_TEXT, BadRecordError, checked_text, text_bytes
from minigpt4.data.sources.guarded_folder import PICTURE_SUFFIXES
from minigpt4.data.sources.tar_members import FILE, Member, members, read_member
from minigpt4.errors import DataError
from minigpt4.processing.pictures import DEFAULT_LIMITS

MAX_JSON_BYTES = 1024**2
"""Of a sample's JSON record, which holds more than the caption: address, size, Exif."""

ROW = np.dtype(
    [
        ("picture", "<u8"),  # where the picture's first header lies, in bytes; NOWHERE: it has none
        ("text", "<u8"),  # where the caption's member begins
        ("picture_size", "<u4"),
        ("text_bytes", "<u4"),  # of the caption itself
        ("shard", "<u4"),
        ("fault", "u1"),
        ("is_json", "u1"),
        ("", "V2"),
    ]
)
"""One sample of an index, 32 bytes."""

_FIELDS = ("picture", "text", "picture_size", "text_bytes", "shard", "fault", "is_json")

MORE_DOTS = "picture or text with a dot before its ending"
"""`a.b.jpg` is part `b.jpg` of the sample `a`, by webdataset's rule."""

NOWHERE = 2**64 - 1
GOOD, FAULT_NO_PICTURE, FAULT_TEXT, FAULT_DOUBLED, FAULT_LARGE, FAULT_DAMAGE = range(6)


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
    damage: str


@dataclass
class _Parts:
    picture: Member | None = None
    json: Member | None = None
    txt: Member | None = None
    doubled: bool = False
    caption: dict[str, int] = field(default_factory=dict)


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
    damage, position = "", 0
    rows = []
    try:
        with shard.open("rb") as file:
            end = shard.stat().st_size
            try:
                for member in members(file, end, shard.name):
                    position = member.after
                    if (reason := _add(member, found)) is not None:
                        skipped[reason] += 1
            except DataError as error:
                damage = error.message
            rows = [_row(file, parts, caption_key) for parts in found.values()]
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {error.strerror}", "check the path and permissions") from error
    if damage:
        rows.append((position, NOWHERE, 0, 0, 0, FAULT_DAMAGE, 0))
    return Contents(_array(rows), skipped, damage)


def sample_key(name: str) -> tuple[str, str]:
    """Split a member's name into the sample's key and the rest, at the first dot of the name's last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def read_content(file: BinaryIO, member: Member) -> bytes:
    """Return a member's content."""
    file.seek(member.data)
    return file.read(member.size)


def member_at(file: BinaryIO, position: int, end: int, shard: str) -> Member:
    """Return the member an index points to.

    Raises:
        DataError: None begins there.
    """
    member = read_member(file, position, end, shard)
    if member is None:
        raise DataError(f"{shard}: nothing lies at byte {position}", "minigpt4 data index FOLDER, and start again")
    return member


def caption_of(file: BinaryIO, member: Member, key: str, caption_key: str, *, is_json: bool) -> str:
    """Read a sample's caption.

    Raises:
        BadRecordError: It is not what the layout promises.
    """
    if member.size > MAX_JSON_BYTES:
        raise BadRecordError(
            LARGE_TEXT, f"{key}: its text file has {member.size:,} bytes, up to {MAX_JSON_BYTES // 1024} KiB are read"
        )
    content = read_content(file, member)
    if is_json:
        return caption_in_json(content, key, caption_key)
    try:
        return checked_text(content.decode("utf-8-sig").strip(), key)
    except UnicodeDecodeError as error:
        raise BadRecordError(WRONG_TEXT, f"{key}: the caption is not UTF-8") from error


def caption_in_json(content: bytes, key: str, caption_key: str) -> str:
    """Take the caption out of a JSON record.

    Raises:
        BadRecordError: The record is not JSON, not an object, or has no caption that is text.
    """
    try:
        record = json.loads(content)
    except RecursionError as error:
        raise BadRecordError(WRONG_TEXT, f"{key}: its JSON is nested too deep") from error
    except ValueError as error:
        raise BadRecordError(WRONG_TEXT, f"{key}: its JSON cannot be read") from error
    if not isinstance(record, dict):
        raise BadRecordError(WRONG_TEXT, f"{key}: its JSON is not an object")
    if caption_key not in record:
        shown = ", ".join(sorted(map(str, record))[:8])[:200]
        raise BadRecordError(
            NO_TEXT, f"{key}: its JSON has no {caption_key!r}, but {shown or 'nothing'}; name one with `text`"
        )
    return checked_text(record[caption_key], key)


def _add(member: Member, found: dict[str, _Parts]) -> str | None:
    """Put a member where it belongs; return what it is where it belongs to no sample."""
    if member.kind != FILE:
        return member.kind
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
        setattr(parts, part, member)
    return None


def _row(file: BinaryIO, parts: _Parts, caption_key: str) -> tuple[int, ...]:
    text, length, fault = parts.json or parts.txt, 0, GOOD
    if parts.doubled:
        fault = FAULT_DOUBLED
    elif text is None:
        fault = FAULT_TEXT
    else:
        text, length = _measured(file, parts, caption_key)
        fault = GOOD if length else FAULT_TEXT
    if fault == GOOD and parts.picture is None:
        fault = FAULT_NO_PICTURE
    elif fault == GOOD and parts.picture and parts.picture.size > DEFAULT_LIMITS.max_bytes:
        fault = FAULT_LARGE
    return (
        parts.picture.start if parts.picture else NOWHERE,
        text.start if text else NOWHERE,
        min(parts.picture.size, 2**32 - 1) if parts.picture else 0,
        length,
        0,
        fault,
        int(text is not None and text is parts.json),
    )


def _measured(file: BinaryIO, parts: _Parts, caption_key: str) -> tuple[Member, int]:
    """Choose the member that holds the caption; return it with the caption's bytes, 0 where it cannot be read."""
    candidates = [member for member in (parts.json, parts.txt) if member]
    for member in candidates:
        try:
            return member, text_bytes(caption_of(file, member, "", caption_key, is_json=member is parts.json))
        except BadRecordError as error:
            if error.kind != NO_TEXT:
                return member, 0
    return candidates[0], 0


def _array(rows: list[tuple[int, ...]]) -> np.ndarray:
    array = np.zeros(len(rows), ROW)
    for name, column in zip(_FIELDS, zip(*rows, strict=True), strict=False):
        array[name] = column
    return array
