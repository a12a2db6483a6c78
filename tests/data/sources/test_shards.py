"""Shards are read by position; bad samples are counted and told, an index is exact, and a stale one is refused."""

import io
import json
import os
import pickle
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minigpt4.data.record import Record
from minigpt4.data.sources import open_source
from minigpt4.data.sources.checking import check_source
from minigpt4.data.sources.safe_files import (
    LARGE_PICTURE,
    LARGE_TEXT,
    MAX_TEXT_BYTES,
    NO_PICTURE,
    NO_TEXT,
    WRONG_TEXT,
    BadRecordError,
)
from minigpt4.data.sources.shard_index import INDEX_NAME
from minigpt4.data.sources.shards import ShardSource, expand_braces, index_folder
from minigpt4.data.sources.tar_shards import MAX_JSON_BYTES
from minigpt4.errors import DataError
from minigpt4.processing.pictures import DEFAULT_LIMITS
from tests.data.sources.source_files import picture, sample, samples, shard, special_member, write
from tests.nano.test_shards import rewrite_header

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def opened(path: Path | str, text: str | None = None) -> ShardSource:
    source = open_source(path, text=text)
    assert isinstance(source, ShardSource)
    return source


def everything(source: ShardSource) -> list[object]:
    """Each record, or the sentence that tells why there is none."""
    found: list[object] = []
    for number in range(len(source)):
        try:
            found.append((source.group(number), source.read(number)))
        except BadRecordError as error:
            found.append((source.group(number), error.kind, error.message))
    return found


def lengths(source: ShardSource) -> list[int]:
    assert source.text_lengths is not None
    return list(source.text_lengths)


def test_img2dataset_shards_are_read(tmp_path: Path) -> None:
    shard(tmp_path / "00001.tar", samples(2, first=2))
    shard(tmp_path / "00000.tar", samples(2))
    write(tmp_path / "00000.parquet", b"PAR1")
    write(tmp_path / "00000_stats.json", {"count": 2})

    source = opened(tmp_path)

    records = [source.read(number) for number in range(len(source))]
    assert [record.key for record in records] == [
        "00000.tar:000000000", "00000.tar:000000001", "00001.tar:000000002", "00001.tar:000000003",
    ]  # fmt: skip
    assert [record.picture for record in records] == [picture(number) for number in range(4)]
    assert [record.turns for record in records] == [(("", f"picture number {number}"),) for number in range(4)]
    assert lengths(source) == [len(f"picture number {number}") for number in range(4)]
    assert [source.group(number) for number in range(4)] == ["00000.tar"] * 2 + ["00001.tar"] * 2
    assert source.known_bad() == [] and source.skipped == {}


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "gif", "bmp", "JPG"])
def test_pictures_of_every_kind_with_a_text_beside_them_are_read(suffix: str, tmp_path: Path) -> None:
    source = opened(shard(tmp_path / "0.tar", {f"1.{suffix}": picture(1), "1.txt": b" a cat\n"}))

    assert source.read(0) == Record("0.tar:1", picture(1), (("", "a cat"),))


def test_key_ends_at_the_first_dot_of_the_last_part(tmp_path: Path) -> None:
    members = {"x.y/1.jpg": b"1", "x.y/1.seg.png": b"", "x.y/1.txt": b"one", "1.jpg": b"2", "1.txt": b"two"}

    source = opened(shard(tmp_path / "0.tar", members))

    assert [source.read(number).key for number in range(2)] == ["0.tar:x.y/1", "0.tar:1"]
    assert [source.read(number).turns[0][1] for number in range(2)] == ["one", "two"]
    assert source.skipped == {"picture or text with a dot before its ending": 1}


def test_json_caption_counts_before_the_text_and_the_text_where_it_has_none(tmp_path: Path) -> None:
    members = {**sample("1", "from json"), "1.txt": b"from text", **sample("2", None), "2.txt": b"from text"}

    source = opened(shard(tmp_path / "0.tar", members))

    assert [source.read(number).turns[0][1] for number in range(2)] == ["from json", "from text"]


def test_another_key_may_hold_the_caption(tmp_path: Path) -> None:
    record = json.dumps({"caption": "short", "recaption": "a long one"}).encode()
    shard(tmp_path / "0.tar", {"1.jpg": picture(), "1.json": record})
    index_folder(str(tmp_path))

    source = opened(tmp_path, text="recaption")

    assert source.read(0).turns == (("", "a long one"),)
    assert source.text_lengths is None
    assert source.identity != opened(tmp_path).identity


def test_control_characters_and_end_marks_are_ordinary_text(tmp_path: Path) -> None:
    caption = "a\0b </s> <image> ### \ud800"

    assert opened(shard(tmp_path / "0.tar", sample("1", caption))).read(0).turns == (("", caption),)


X = {"b.jpg": b"x"}
LONG = "x" * (MAX_TEXT_BYTES + 1)
LARGE = bytes(DEFAULT_LIMITS.max_bytes + 1)
BAD_SAMPLES: dict[str, tuple[dict[str, bytes], str, str]] = {
    "picture without text": (X, NO_TEXT, " has no caption"),
    "text without picture": ({"b.txt": b"cat"}, NO_PICTURE, " has no picture"),
    "JSON without picture": ({"b.json": b'{"caption": "a"}'}, NO_PICTURE, " has no picture"),
    "empty picture": ({"b.jpg": b"", "b.txt": b"cat"}, NO_PICTURE, ": the picture is empty"),
    "JSON that is cut": ({**X, "b.json": b"{"}, WRONG_TEXT, ": its JSON cannot be read"),
    "JSON list": ({**X, "b.json": b"[]"}, WRONG_TEXT, ": its JSON is not an object"),
    "deep JSON": ({**X, "b.json": b"[" * 10**5}, WRONG_TEXT, ": its JSON is nested too deep"),
    "huge number": ({**X, "b.json": b'{"a": ' + b"9" * 5000 + b"}"}, WRONG_TEXT, ": its JSON cannot be read"),
    "no caption key": (
        {**X, "b.json": b'{"alt": 1}'},
        NO_TEXT,
        ": its JSON has no 'caption', but alt; name one with `text`",
    ),
    "null caption": (sample("b", None), NO_TEXT, " has no caption"),
    "blank caption": (sample("b", " \n"), NO_TEXT, " has no caption"),
    "list of captions": (sample("b", ["a"]), WRONG_TEXT, ": the caption is a list, expected text"),
    "long caption": (sample("b", LONG), LARGE_TEXT, ": the caption has 262,145 characters, up to 256 KiB are read"),
    "huge JSON": ({**X, "b.json": b" " * (MAX_JSON_BYTES + 1)}, LARGE_TEXT, ": its text file has 1,048,577 bytes"),
    "text that is no UTF-8": ({**X, "b.txt": b"\xff"}, WRONG_TEXT, ": the caption is not UTF-8"),
    "huge picture": ({"b.jpg": LARGE, "b.txt": b"x"}, LARGE_PICTURE, ": the picture has 20,971,521 bytes"),
}


@pytest.mark.parametrize("fault", BAD_SAMPLES)
def test_bad_sample_is_counted_and_told_and_its_neighbours_are_read(fault: str, tmp_path: Path) -> None:
    members, kind, sentence = BAD_SAMPLES[fault]
    source = opened(shard(tmp_path / "0.tar", {**sample("a", "one", 1), **members, **sample("c", "two", 2)}))

    with pytest.raises(BadRecordError) as told:
        source.read(1)

    assert told.value.kind == kind
    assert told.value.message.startswith(f"0.tar:b{sentence}") and "\n" not in told.value.message
    assert [source.read(number).turns[0][1] for number in (0, 2)] == ["one", "two"]
    assert len(source) == 3 and source.known_bad() in ([1], [])  # an empty picture is found on reading


def test_name_that_stands_twice_is_bad(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in ("1.jpg", "1.txt", "1.jpg", "2.txt", "2.jpg"):
            archive.addfile(special_member(name, tarfile.REGTYPE, 1), io.BytesIO(b"x"))

    source = opened(tmp_path)

    assert source.known_bad() == [0]
    with pytest.raises(BadRecordError, match=r"0\.tar:1 stands twice in its shard"):
        source.read(0)
    assert source.read(1).key == "0.tar:2"


def test_members_of_other_kinds_are_passed_over_and_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        archive.addfile(special_member("1.jpg", tarfile.SYMTYPE, link="/etc/passwd"))
        archive.addfile(special_member("1.json", tarfile.LNKTYPE, link="2.json"))
        archive.addfile(special_member("1.cls", tarfile.REGTYPE))
        archive.addfile(special_member("1.pyd", tarfile.REGTYPE))
        archive.addfile(special_member("2.pyd", tarfile.REGTYPE))
        archive.addfile(special_member("._1.jpg", tarfile.REGTYPE))
        archive.addfile(special_member("dev.jpg", tarfile.CHRTYPE))
    shard(tmp_path / "1.tar", samples(1))

    source = opened(tmp_path)

    assert len(source) == 1
    assert source.skipped == {
        "symbolic link": 1, "hard link": 1, "file of kind .cls": 1, "file of kind .pyd": 2, "hidden file": 1,
        "device": 1,
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "garbage"])
def test_damaged_shard_keeps_what_comes_before_and_counts_the_damage(damage: str, tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", samples(1))
    path = shard(tmp_path / "1.tar", samples(3, first=1))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "header":
        rewrite_header(path, 4096, 0, b"Z", mend_sum=False)
    else:
        path.write_bytes(b"" if damage == "empty" else b"x" * 5000)

    source = opened(tmp_path)

    assert source.read(0).key == "0.tar:000000000"
    last = len(source) - 1
    assert last in source.known_bad() and source.group(last) == "1.tar"
    with pytest.raises(BadRecordError, match=r"^1\.tar: ") as told:
        source.read(last)
    assert told.value.kind == "damaged file"
    whole = {"cut": 2, "header": 2, "empty": 0, "garbage": 0}[damage]
    assert [source.read(1 + number).key for number in range(min(whole, 1))] == ["1.tar:000000001"][: min(whole, 1)]


@pytest.mark.parametrize(("every", "share"), [(200, 0.005), (20, 0.05), (1, 1.0)])
def test_bad_samples_are_counted_exactly(every: int, share: float, tmp_path: Path) -> None:
    members = samples(400)
    for number in range(0, 400, every):
        members[f"{number:09d}.jpg"] = b"no picture"
    shard(tmp_path / "0.tar", members)
    started = time.monotonic()

    check = check_source(opened(tmp_path))

    assert time.monotonic() - started < 10
    assert check.bad == 400 * share and check.good == 400 - check.bad
    (fault,) = check.faults.values()
    assert fault.examples[0].startswith("0.tar:000000000: the picture is not a picture file")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(folder / "00000.tar", samples(3))
    shard(folder / "00001.tar", {**samples(2, first=3), "x.jpg": picture(), "y.cls": b""})
    shard(folder / "00002.tar", samples(1, first=5)).write_bytes(b"")
    return folder


def test_an_index_file_gives_the_same_source(folder: Path) -> None:
    without = opened(folder)

    path, _ = index_folder(str(folder))
    source = opened(folder)

    assert path == folder / INDEX_NAME and path.is_file()
    assert isinstance(source.index.rows, np.memmap)
    assert everything(source) == everything(without)
    assert (source.identity, source.skipped) == (without.identity, without.skipped)
    assert lengths(source) == lengths(without)
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "00000.tar", "00001.tar", "00002.tar", INDEX_NAME,
    ]  # fmt: skip


def test_an_indexed_source_reaches_another_process_as_a_name(folder: Path) -> None:
    for tar in range(8):
        shard(folder / f"1{tar:04d}.tar", samples(50, first=1000 * tar))
    in_memory = opened(folder)
    index_folder(str(folder))
    source = opened(folder)

    sent = pickle.dumps(source)

    assert everything(pickle.loads(sent)) == everything(source) == everything(pickle.loads(pickle.dumps(in_memory)))
    assert len(sent) < len(pickle.dumps(in_memory)) / 3


def change_time(folder: Path) -> None:
    os.utime(folder / "00001.tar", ns=(1, 1))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another time": (change_time, r"was made before 00001\.tar changed"),
    "another content": (lambda folder: shard(folder / "00001.tar", samples(9)), r"before 00001\.tar changed"),
    "a new shard": (lambda folder: shard(folder / "00003.tar", samples(9)), r"does not know 00003\.tar"),
    "a shard less": (lambda folder: (folder / "00001.tar").unlink(), r"knows 00001\.tar, which is gone"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stale_index_is_refused(change: str, folder: Path) -> None:
    index_folder(str(folder))
    change_it, words = CHANGES[change]
    change_it(folder)

    with pytest.raises(DataError, match=words) as told:
        opened(folder)

    assert told.value.hint == f"minigpt4 data index {folder}"
    index_folder(str(folder))
    assert len(opened(folder)) > 0


@pytest.mark.parametrize("content", [b"", b"{}\n", b"x" * 200, b'{"format": "minigpt4 shard index 1"}\n', b"[" * 10**5])
def test_damaged_index_is_refused(content: bytes, folder: Path) -> None:
    write(folder / INDEX_NAME, content)

    with pytest.raises(DataError, match="is not an index of this version, or it is damaged") as told:
        opened(folder)

    assert told.value.hint == f"minigpt4 data index {folder}"


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"x"])
def test_index_of_another_length_is_refused(change: Callable[[bytes], bytes], folder: Path) -> None:
    path, _ = index_folder(str(folder))
    path.write_bytes(change(path.read_bytes()))

    with pytest.raises(DataError, match="is not an index"):
        opened(folder)


def test_shard_that_changes_behind_an_open_index_is_noticed(folder: Path) -> None:
    index_folder(str(folder))
    source = opened(folder)
    shard(folder / "00000.tar", {"other": b"x" * 3, **samples(3)})

    with pytest.raises(DataError):
        for number in range(3):
            assert source.read(number).key == f"00000.tar:{number:09d}"


def test_picture_of_another_size_than_indexed_is_noticed(folder: Path) -> None:
    source = opened(folder)
    shard(folder / "00000.tar", {"000000000.jpg": picture(0) + b"x", "000000000.json": b"{}", **samples(2, first=1)})

    with pytest.raises(DataError, match=r"00000\.tar:000000000 is not what the index says"):
        source.read(0)


def test_index_that_points_beyond_its_shards_is_an_error_of_ours(folder: Path) -> None:
    path, index = index_folder(str(folder))
    rows = np.array(index.rows)
    rows["shard"] = 99
    path.write_bytes(path.read_bytes()[: -rows.nbytes] + rows.tobytes())
    source = opened(folder)

    for look in (source.read, source.group):
        with pytest.raises(DataError, match="speaks of shard 99, it has 3"):
            look(0)


def test_one_shard_or_a_pattern_takes_its_part_of_the_index(folder: Path) -> None:
    index_folder(str(folder))
    whole = everything(opened(folder))

    one = opened(folder / "00001.tar")
    two = opened(f"{folder}/{{00001..00002}}.tar")

    assert everything(one) == [found for found in whole if found[0] == "00001.tar"]  # type: ignore[index]
    assert everything(two) == [found for found in whole if found[0] != "00000.tar"]  # type: ignore[index]
    assert len({one.identity, two.identity, opened(folder).identity}) == 3


def test_pattern_counts_the_missing_shards(folder: Path) -> None:
    with pytest.raises(DataError, match=r"7 of 10 shards of .* are missing, the first is .*00003\.tar"):
        opened(f"{folder}/{{00000..00009}}.tar")


def test_patterns_expand_as_in_a_shell() -> None:
    assert expand_braces("x{08..11}.tar") == ["x08.tar", "x09.tar", "x10.tar", "x11.tar"]
    assert expand_braces("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for wrong in ("{a}.tar", "{3..1}.tar", "{0..99999999999}.tar"):
        with pytest.raises(DataError) as refused:
            expand_braces(wrong)
        assert refused.value.hint


def test_pattern_of_a_trillion_shards_is_refused_before_they_are_named() -> None:
    with pytest.raises(DataError, match="names 1,000,000,000,000 shards, up to 1,000,000 are read"):
        expand_braces("{0..999999}-{0..999999}.tar")


def test_shards_for_testing_are_left_out_of_a_folder(tmp_path: Path) -> None:
    for name in ("cc3m-train-0000", "cc3m-validation-0000"):
        shard(tmp_path / f"{name}.tar", samples(1))

    assert opened(tmp_path).group(0) == "cc3m-train-0000.tar"
    assert opened(tmp_path).skipped == {"file of another split": 1}
    assert index_folder(str(tmp_path))[1].skipped == {"file of another split": 1}
    assert opened(tmp_path).skipped == {"file of another split": 1}
    assert opened(tmp_path / "cc3m-validation-0000.tar").group(0) == "cc3m-validation-0000.tar"


def test_shards_below_a_folder_of_shards_are_counted(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", samples(1))
    (tmp_path / "more").mkdir()
    shard(tmp_path / "more" / "1.tar", samples(1))

    assert len(opened(tmp_path)) == 1 and opened(tmp_path).skipped == {"shard in a folder below": 1}


@pytest.mark.parametrize(
    ("members", "words", "hint"),
    [
        ({}, "1 shard and not one sample in it, expected KEY.jpg with KEY.json or KEY.txt", "other shards"),
        (
            {"a.v2.jpg": b"x", "a.v2.txt": b"x", "b.jpg.cls": b"x"},
            "KEY.txt; passed over: 2 x picture or text with a dot before its ending, 1 x other file",
            "a sample's name ends at the first dot",
        ),
    ],
)
def test_shards_without_any_sample_are_refused(
    members: dict[str, bytes], words: str, hint: str, tmp_path: Path
) -> None:
    shard(tmp_path / "0.tar", members)

    for look in (open_source, lambda path: index_folder(str(path))):
        with pytest.raises(DataError) as told:
            look(tmp_path)
        assert words in told.value.message and hint in told.value.hint
    assert not (tmp_path / INDEX_NAME).exists()


def test_identity_follows_the_content_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    before = opened(folder).identity
    moved = folder.rename(tmp_path / "elsewhere")
    change_time(moved)

    assert opened(moved).identity == before
    shard(moved / "00000.tar", samples(3, first=7))
    assert opened(moved).identity != before


def test_making_an_index_is_reported(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []

    open_source(folder, report=lambda *what: told.append(what))

    assert told == [("reading shards", number, 3) for number in (1, 2, 3)]


@pytest.mark.parametrize("name", ["coco-captions-val", "photos-val"])
def test_real_shards_are_sound(name: str) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"shared/data/{name} is not here")

    source = opened(SHARED / name)

    assert len(source) > 100 and source.known_bad() == [] and source.skipped == {}
    with tarfile.open(SHARED / name / "00000.tar") as archive:
        first = archive.extractfile("000000000.json")
        assert first is not None
        assert source.read(0).turns == (("", json.load(first)["caption"]),)
