"""Archives are read as the standard library reads them, and hostile ones come to an end with a sentence."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.data.sources.tar_members import BLOCK, FILE, MAX_EXTENDED_HEADERS, Member, members, read_member
from minigpt4.errors import DataError
from tests.data.sources.source_files import shard, special_member
from tests.nano.test_shards import rewrite_header

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG = "folder/" * 20 + "name.jpg"
UNICODE = "\N{SNOWMAN}/\N{LATIN SMALL LETTER U WITH DIAERESIS}.jpg"


def read(content: bytes) -> list[Member]:
    return list(members(io.BytesIO(content), len(content), "0.tar"))


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
def test_names_places_and_sizes_are_the_standard_librarys(format: int, tmp_path: Path) -> None:
    contents = {"a.jpg": b"x" * 700, "empty": b"", LONG: b"y" * 512, "b.c.json": b"{}"}
    if format != tarfile.USTAR_FORMAT:
        contents |= {UNICODE: b"z", "n" * 300: b"long"}
    path = shard(tmp_path / "0.tar", contents, format=format)

    with tarfile.open(path) as archive:
        expected = [(member.name, member.offset, member.offset_data, member.size) for member in archive]

    found = read(path.read_bytes())
    assert [(member.name, member.start, member.data, member.size) for member in found] == expected
    assert {member.kind for member in found} == {FILE}


def test_a_member_is_read_again_from_where_its_headers_begin(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", {"a": b"x", "n" * 300: b"long", "b": b"y"})
    content = path.read_bytes()

    for member in read(content):
        assert read_member(io.BytesIO(content), member.start, len(content), "0.tar") == member


@pytest.mark.parametrize(
    ("type_", "kind"),
    [
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.DIRTYPE, "folder"),
        (tarfile.FIFOTYPE, "named pipe"),
    ],
)
def test_what_is_no_file_is_named_and_has_no_content(type_: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(special_member("a.jpg", type_, link="/etc/passwd"))
        archive.addfile(special_member("b.jpg", tarfile.REGTYPE, 3), io.BytesIO(b"abc"))

    first, second = read(path.read_bytes())

    assert (first.kind, first.size, second.kind, second.name) == (kind, 0, FILE, "b.jpg")


def test_size_of_what_is_no_file_is_not_believed() -> None:
    archive = header(b"a", b"2", b"00000077777") + header(b"b", b"0", b"00000000001") + padded(b"x") + END

    assert [(member.name, member.kind, member.size) for member in read(archive)] == [
        ("a", "symbolic link", 0), ("b", FILE, 1),
    ]  # fmt: skip


def test_sparse_files_are_not_taken_for_files() -> None:
    sparse = bytearray(header(b"a", b"S", b"00000000003"))
    sparse[482] = 1  # the map goes on in another block
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    archive = bytes(sparse) + bytes(BLOCK) + padded(b"abc") + header(b"b", b"0", b"00000000001") + padded(b"x") + END

    assert [(member.name, member.kind) for member in read(archive)] == [("a", "sparse file"), ("b", FILE)]


def test_pax_sparse_files_are_not_taken_for_files() -> None:
    records = b"22 GNU.sparse.major=1\n"
    archive = header(b"p", b"x", b"%011o" % len(records)) + padded(records)
    archive += header(b"a", b"0", b"00000000001") + padded(b"x") + END

    assert [member.kind for member in read(archive)] == ["sparse file"]


def pax(records: bytes) -> bytes:
    return header(b"p", b"x", b"%011o" % len(records)) + padded(records) + header(b"a", b"0", b"1") + padded(b"x") + END


LONG_NAME = header(b"l", b"L", b"00000000002") + padded(b"n\0")
HOSTILE = {
    "empty file": (b"", "the file is empty"),
    "no end mark": (header(b"a", b"0", b"00000000001") + padded(b"x"), "ends without an end mark"),
    "cut in a header": (header(b"a", b"0", b"00000000000")[:300], "ends within the header at byte 0"),
    "cut in the content": (header(b"a", b"0", b"00000003000") + padded(b"x"), "runs past the end"),
    "negative size": (header(b"a", b"0", b"-0000000512") + padded(b"x") + END, "no tar header at byte 0"),
    "negative size in bytes": (header(b"a", b"0", b"\xff" * 12) + END, "no tar header at byte 0"),
    "endless size in bytes": (header(b"a", b"0", b"\x80" + b"\xff" * 11) + END, "runs past the end"),
    "size with signs Python reads": (header(b"a", b"0", b"0_0o17") + END, "no tar header at byte 0"),
    "pax header of 1 GB": (header(b"p", b"x", b"07346545000") + END, "extended header at byte 0 runs past the end"),
    "large pax header": (header(b"p", b"x", b"00010000000") + bytes(2**21) + END, "up to 1 MiB is read"),
    "pax size below zero": (pax(b"12 size=-51\n"), "declares a size that is no number"),
    "pax length zero": (pax(b"0 path=abc\n"), "pax header at byte 0 is damaged"),
    "pax length beyond": (pax(b"99 path=abc\n"), "pax header at byte 0 is damaged"),
    "pax length too small": (pax(b"5 path=abc\n"), "pax header at byte 0 is damaged"),
    "pax size beyond the end": (pax(b"20 size=99999999999\n"), "runs past the end"),
    "chain of long names": (LONG_NAME * (MAX_EXTENDED_HEADERS + 1) + END, "more than 8 extended headers at byte 0"),
    "long name at the end": (LONG_NAME, "ends without an end mark"),
    "no archive": (b"x" * 2000, "no tar header at byte 0"),
    "compressed": (gzip.compress(b"x" * 2000), "the archive is compressed by gzip, expected a plain tar"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_archive_ends_with_a_sentence(fault: str) -> None:
    content, words = HOSTILE[fault]

    with pytest.raises(DataError, match=words) as told:
        read(content)

    assert told.value.message.startswith("0.tar: ")


def test_members_before_the_damage_are_kept(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", {"a": b"x", "b": b"y"})
    rewrite_header(path, 2 * BLOCK, 0, b"Z", mend_sum=False)
    found = []

    with pytest.raises(DataError, match="the tar header at byte 1024 is damaged"):
        for member in members(io.BytesIO(path.read_bytes()), path.stat().st_size, "0.tar"):
            found.append(member.name)

    assert found == ["a"]


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
        for member in members(io.BytesIO(content), len(content), "0.tar"):
            assert before < member.start < member.after
            assert member.data + member.size <= len(content)
            before = member.start
    except DataError as error:
        assert error.message.startswith("0.tar: ")
