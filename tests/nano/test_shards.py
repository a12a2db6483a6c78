"""Shards are read by position, and a damaged one is refused with its place."""

import io
import json
import tarfile
from pathlib import Path
from tarfile import BLOCKSIZE as BLOCK

import pytest

from minigpt4.errors import DataError
from nano.shards import index_shard, index_shards


def shard(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pair(key: str) -> dict[str, bytes]:
    return {f"{key}.jpg": f"picture {key}".encode(), f"{key}.json": json.dumps({"caption": key}).encode()}


def rewrite_header(path: Path, offset: int, start: int, value: bytes, *, mend_sum: bool = True) -> None:
    """Change a field of the header at `offset`, and its sum with it."""
    content = bytearray(path.read_bytes())
    content[offset + start : offset + start + len(value)] = value
    if mend_sum:
        header = content[offset : offset + BLOCK]
        header[148:156] = b" " * 8
        content[offset + 148 : offset + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(content)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_found_and_read(format: int, tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", {**pair("a"), "note.txt": b"x", **pair("folder/b")}, format=format)

    samples = index_shard(path)

    assert [sample.key for sample in samples] == ["a", "b"]
    assert [sample.read_picture() for sample in samples] == [b"picture a", b"picture folder/b"]
    assert samples[1].read_record() == {"caption": "folder/b"}


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    shard(tmp_path / "00001.tar", pair("c"))
    shard(tmp_path / "00000.tar", {**pair("b"), **pair("a")})

    assert [sample.key for sample in index_shards(tmp_path)] == ["b", "a", "c"]


def test_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tar shards in"):
        index_shards(tmp_path)


def test_empty_archive_has_no_samples(tmp_path: Path) -> None:
    assert index_shard(shard(tmp_path / "0.tar", {})) == []


@pytest.mark.parametrize("missing", ["a.jpg", "a.json"])
def test_sample_without_picture_or_record_is_refused(missing: str, tmp_path: Path) -> None:
    members = {**pair("a"), **pair("b")}
    del members[missing]

    with pytest.raises(DataError, match=r"0\.tar: sample a has"):
        index_shard(shard(tmp_path / "0.tar", members))


def test_damaged_header_is_refused_with_its_place(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", pair("a"))
    rewrite_header(path, 2 * BLOCK, 0, b"Z", mend_sum=False)

    with pytest.raises(DataError, match=r"0\.tar: the tar header at byte 1024 is damaged"):
        index_shard(path)


@pytest.mark.parametrize(
    ("size", "why"),
    [
        (b"77777777777\0", "runs past the end"),
        (b"00000100000\0", "runs past the end"),
        (b"-0000000001\0", "no tar header|runs past the end"),
        (b"zzzzzzzzzzz\0", "no tar header"),
        (b"\x80" + bytes(7) + b"\xff\xff\xff\xff", "no tar header|runs past the end"),
        (b"\xff" * 12, "no tar header|runs past the end"),
    ],
)
def test_lie_about_a_size_is_refused(size: bytes, why: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", pair("a"))
    rewrite_header(path, 0, 124, size)

    with pytest.raises(DataError, match=why):
        index_shard(path)


@pytest.mark.parametrize("content", [b"x" * 2000, b"\x1f\x8b" + b"\0" * 1000])
def test_file_that_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(content)

    with pytest.raises(DataError, match=r"0\.tar: (no tar header at byte 0|the archive is compressed by gzip)"):
        index_shard(tmp_path / "0.tar")


def test_file_cut_within_a_member_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", pair("a"))
    path.write_bytes(path.read_bytes()[: 3 * BLOCK + 4])

    with pytest.raises(DataError, match="byte 1024 runs past the end"):
        index_shard(path)


def test_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", pair("a"))
    rewrite_header(path, 0, 0, b"\xff\xfe")

    with pytest.raises(DataError, match=r"0\.tar"):
        index_shard(path)


@pytest.mark.parametrize(
    ("record", "why"), [(b"{", "is not JSON"), (b"[]", "not a JSON object"), (b"\xff", "not JSON")]
)
def test_record_that_is_no_object_is_refused(record: bytes, why: str, tmp_path: Path) -> None:
    (sample,) = index_shard(shard(tmp_path / "0.tar", {"a.jpg": b"x", "a.json": record}))

    with pytest.raises(DataError, match=f"sample a is {why}|sample a {why}|{why}"):
        sample.read_record()
