"""Archives are read as the standard library reads them, and hostile ones come to an end with a sentence."""

import contextlib
import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path
from tarfile import BLOCKSIZE as BLOCK

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.data.sources.tar_shards import MAX_HEADER_BYTES, TarReader
from minigpt4.errors import DataError
from tests.data.sources.source_files import shard, special_member

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG = "folder/" * 20 + "name.jpg"
UNICODE = "\N{SNOWMAN}/\N{LATIN SMALL LETTER U WITH DIAERESIS}.jpg"


def read(content: bytes) -> list[tarfile.TarInfo]:
    return list(TarReader(io.BytesIO(content), "0.tar"))


def header(name: bytes, type_: bytes, size: bytes) -> bytes:
    """A header made by hand, with a right sum."""
    block = bytearray(BLOCK)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, type_
    block[257:263], block[148:156] = b"ustar\0", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


END = bytes(2 * BLOCK)


@pytest.mark.parametrize("format", FORMATS)
def test_places_are_the_standard_librarys_and_members_are_read_from_them(format: int, tmp_path: Path) -> None:
    contents = {"a.jpg": b"x" * 700, "empty": b"", LONG: b"y" * 512, "b.c.json": b"{}"}
    if format != tarfile.USTAR_FORMAT:
        contents |= {UNICODE: b"z", "n" * 300: b"long"}
    path = shard(tmp_path / "0.tar", contents, format=format)
    with tarfile.open(path) as archive:
        expected = [(member.name, member.offset, member.offset_data, member.size) for member in archive]

    found = read(path.read_bytes())

    assert [(member.name, member.offset, member.offset_data, member.size) for member in found] == expected
    reader = TarReader(io.BytesIO(path.read_bytes()), "0.tar")
    for member in reversed(found):
        again = reader.member_at(member.offset)
        assert again is not None and (again.name, again.offset_data) == (member.name, member.offset_data)
        assert reader.read(again.offset_data, again.size) == contents[again.name]


def test_size_of_what_is_no_file_is_not_believed() -> None:
    archive = header(b"a", b"2", b"00000077777") + header(b"b", b"0", b"00000000001") + padded(b"x") + END

    assert [(member.name, member.isreg()) for member in read(archive)] == [("a", False), ("b", True)]


def pax(records: bytes) -> bytes:
    return header(b"p", b"x", b"%011o" % len(records)) + padded(records) + header(b"a", b"0", b"1") + padded(b"x") + END


LONG_NAME = header(b"l", b"L", b"00000000002") + padded(b"n\0")
NO_HEADER, PAST = "no tar header at byte 0", "runs past the end"
HOSTILE = {
    "empty file": (b"", "the file is empty"),
    "no end mark": (header(b"a", b"0", b"00000000001") + padded(b"x"), "the file ends without an end mark"),
    "cut in a header": (header(b"a", b"0", b"00000000000")[:300], NO_HEADER),
    "cut in the content": (header(b"a", b"0", b"00000003000") + padded(b"x"), PAST),
    "negative size": (header(b"a", b"0", b"-0000000512") + padded(b"x") + END, PAST),
    "negative size in bytes": (header(b"a", b"0", b"\xff" * 12) + END, PAST),
    "endless size in bytes": (header(b"a", b"0", b"\x80" + b"\xff" * 11) + END, PAST),
    "pax header of 1 GB": (header(b"p", b"x", b"07346545000") + END, NO_HEADER),
    "large pax header": (header(b"p", b"x", b"00010000000") + bytes(2**21) + END, "more than 32 KiB"),
    "negative pax header": (header(b"p", b"x", b"-0000010000") + END, NO_HEADER),
    "pax size below zero": (pax(b"12 size=-51\n"), PAST),
    "pax length zero": (pax(b"0 path=abc\n"), NO_HEADER),
    "pax size beyond the end": (pax(b"20 size=99999999999\n"), PAST),
    "chain of long names": (LONG_NAME * 10_000 + END, NO_HEADER),
    "long name at the end": (LONG_NAME, NO_HEADER),
    "no archive": (b"x" * 2000, NO_HEADER),
    "compressed": (gzip.compress(b"x" * 2000), "the archive is compressed by gzip, expected a plain tar"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_archive_ends_with_a_sentence(fault: str) -> None:
    content, words = HOSTILE[fault]

    with pytest.raises(DataError, match=words) as told:
        read(content)

    assert told.value.message.startswith("0.tar: ")


def test_headers_are_read_in_bounded_memory() -> None:
    records = b"2 " * (MAX_HEADER_BYTES // 3) + b"="  # each is a key as long as all that follow, for the library
    tracemalloc.start()

    with contextlib.suppress(DataError):
        read(pax(records))

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20


@given(data=st.data())
def test_any_archive_comes_to_an_end(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=data.draw(st.sampled_from(FORMATS[1:]))) as archive:
        for name in ("a.jpg", "n" * 200, "b.json"):
            archive.addfile(special_member(name, tarfile.REGTYPE, 3), io.BytesIO(b"abc"))
    content = bytearray(buffer.getvalue()[: data.draw(st.integers(0, len(buffer.getvalue())))])
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for start in range(0, len(content) - BLOCK + 1, BLOCK):  # mend the sums, so that the damage is believed
        if data.draw(st.booleans()) and any(content[start : start + BLOCK]):
            content[start + 148 : start + 156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + BLOCK])
    before = -1
    try:
        for member in TarReader(io.BytesIO(content), "0.tar"):
            assert before < member.offset
            assert not member.isreg() or member.offset_data + member.size <= len(content)
            before = member.offset
    except DataError as error:
        assert error.message.startswith("0.tar: ")
