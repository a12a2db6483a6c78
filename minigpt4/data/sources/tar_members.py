"""Reading tar archives by position: ustar, pax and GNU's long names, with every step bounded.

The standard library's reader loops for ever on crafted archives (CVE-2025-8194, CVE-2019-20907), holds all members in
memory and knows no way back to one of them. This one reads a header, or the chain of headers that belongs to one
member, and every step goes forward, so that any file comes to an end. It never extracts and follows no link.

Knows the archive format and nothing of what the members hold.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from minigpt4.errors import DataError

BLOCK = 512
MAX_EXTENDED_BYTES = 1024**2
"""Of a pax or long-name header; names end at a few hundred bytes."""
MAX_EXTENDED_HEADERS = 8
"""Before one member; archivers write up to three."""

FILE = "file"
_FILES = frozenset([b"0", b"\0", b"7"])
_WITHOUT_DATA = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "named pipe",
}
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*", re.DOTALL)
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_HINT = "fetch or write the archive again"


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an archive.

    Args:
        name: As the archive has it, with `/`; bytes that are not UTF-8 are written as escapes.
        kind: `FILE`, or in words what else it is.
        start: Where its first header lies, in bytes.
        data: Where its content lies.
        size: Of its content.
        after: Where the next member's first header lies.
    """

    name: str
    kind: str
    start: int
    data: int
    size: int
    after: int


def members(file: BinaryIO, end: int, archive: str) -> Iterator[Member]:
    """Yield an archive's members in order.

    Args:
        file: The archive, opened for reading bytes.
        end: Its size.
        archive: Its name, for complaints.

    Raises:
        DataError: The archive is damaged, with the place; the members before it were yielded.
    """
    if end == 0:
        raise DataError(f"{archive}: the file is empty, expected a tar archive", _HINT)
    file.seek(0)
    begins = file.read(max(map(len, _COMPRESSED)))
    if program := next((_COMPRESSED[magic] for magic in _COMPRESSED if begins.startswith(magic)), None):
        raise DataError(f"{archive}: the archive is compressed by {program}, expected a plain tar", "unpack it once")
    position = 0
    while member := read_member(file, position, end, archive):
        yield member
        position = member.after


def read_member(file: BinaryIO, position: int, end: int, archive: str) -> Member | None:
    """Read the member whose first header lies at `position`.

    Returns:
        The member; None where the archive's end mark stands.

    Raises:
        DataError: No header lies there, it is damaged, or the member runs past the end of the file.
    """
    start, long_name, pax = position, None, _Pax()
    for _ in range(MAX_EXTENDED_HEADERS + 1):
        header = _block(file, position, end, archive)
        if not header.strip(b"\0"):
            return None
        _check_sum(header, position, archive)
        type_, size, data = header[156:157], _size(header, position, archive), position + BLOCK
        if type_ not in (b"L", b"K", b"x", b"X", b"g"):
            return _member(file, header, (start, data, size, end), long_name, pax, archive)
        content = _extended(file, data, size, end, archive, wanted=type_ in b"LxX")
        if type_ == b"L":
            long_name = content.split(b"\0")[0]
        elif type_ in b"xX":
            pax = _read_pax(content, position, archive)
        position = data + _padded(size)
    raise DataError(f"{archive}: more than {MAX_EXTENDED_HEADERS} extended headers at byte {start}", _HINT)


@dataclass(frozen=True, slots=True)
class _Pax:
    path: bytes | None = None
    size: int | None = None
    sparse: bool = False


def _member(
    file: BinaryIO, header: bytes, place: tuple[int, int, int, int], long_name: bytes | None, pax: _Pax, archive: str
) -> Member:
    start, data, size, end = place
    type_ = header[156:157]
    name = pax.path or long_name or _short_name(header)
    kind = _WITHOUT_DATA.get(type_, FILE if type_ in _FILES else "member of an unknown kind")
    if type_ == b"S":
        kind, data = "sparse file", _after_sparse_headers(file, header, data, end, archive)
    elif pax.sparse:
        kind = "sparse file"
    size = 0 if type_ in _WITHOUT_DATA else size if pax.size is None else pax.size
    if data + size > end:
        raise DataError(f"{archive}: the member at byte {start} runs past the end of the file", _HINT)
    return Member(name.decode("utf-8", "backslashreplace"), kind, start, data, size, data + _padded(size))


def _block(file: BinaryIO, position: int, end: int, archive: str) -> bytes:
    if position + BLOCK > end:
        what = "without an end mark" if position >= end else f"within the header at byte {position}"
        raise DataError(f"{archive}: the file ends {what}, so it may be cut short", _HINT)
    file.seek(position)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise DataError(f"{archive}: the file became shorter while it was read", _HINT)
    return block


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _short_name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    is_ustar = header[257:263] == b"ustar\0"  # GNU's own format keeps times where ustar keeps the prefix
    return prefix + b"/" + name if prefix and is_ustar else name


def _check_sum(header: bytes, position: int, archive: str) -> None:
    """Check the header's sum, so that garbage is not taken for an archive."""
    match = _OCTAL.fullmatch(header[148:156])
    if not match or not match[1]:
        raise DataError(f"{archive}: no tar header at byte {position}", _HINT)
    declared, others = int(match[1], 8), header[:148] + b" " * 8 + header[156:]
    # Old archivers summed signed bytes.
    if declared != (total := sum(others)) and declared != total - 256 * sum(byte > 127 for byte in others):
        raise DataError(f"{archive}: the tar header at byte {position} is damaged", _HINT)


def _size(header: bytes, position: int, archive: str) -> int:
    field = header[124:136]
    if field[0] == 0x80:  # GNU's way to write 8 GiB and more: a number in bytes
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if not match:
        raise DataError(f"{archive}: no tar header at byte {position}, its size is no number", _HINT)
    return int(match[1] or b"0", 8)


def _extended(file: BinaryIO, data: int, size: int, end: int, archive: str, *, wanted: bool) -> bytes:
    """Return the content of a header that belongs to the next member; b"" where it is not wanted."""
    if data + size > end:
        raise DataError(f"{archive}: the extended header at byte {data - BLOCK} runs past the end of the file", _HINT)
    if not wanted:
        return b""
    if size > MAX_EXTENDED_BYTES:
        raise DataError(
            f"{archive}: the extended header at byte {data - BLOCK} has {size:,} bytes, up to 1 MiB is read"
        )
    file.seek(data)
    return file.read(size)


def _read_pax(content: bytes, position: int, archive: str) -> _Pax:
    """Read `LENGTH KEY=VALUE` lines; a length that does not lead forward to a line's end is refused."""
    values: dict[bytes, bytes] = {}
    at, sparse = 0, False
    while at < len(content) and content[at]:
        match = _PAX_RECORD.match(content, at)
        line_end = at + int(match[1]) if match else 0
        if not match or not match.end() < line_end <= len(content) or content[line_end - 1] != ord("\n"):
            raise DataError(f"{archive}: the pax header at byte {position} is damaged", _HINT)
        values[match[2]] = content[match.end() : line_end - 1]
        sparse |= match[2].startswith(b"GNU.sparse.")
        at = line_end
    size = values.get(b"size")
    if size is not None and not re.fullmatch(rb"\d{1,20}", size):
        raise DataError(f"{archive}: the pax header at byte {position} declares a size that is no number", _HINT)
    return _Pax(values.get(b"path") or None, None if size is None else int(size), sparse)


def _after_sparse_headers(file: BinaryIO, header: bytes, data: int, end: int, archive: str) -> int:
    """Return where the content begins that follows a GNU sparse header and the blocks that continue its map."""
    more = header[482]
    while more:
        more = _block(file, data, end, archive)[504]
        data += BLOCK
    return data
