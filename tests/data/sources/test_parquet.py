"""Parquet files with pictures, read by row group."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt4.data.record import Record
from minigpt4.data.sources import open_source, parquet
from minigpt4.data.sources.safe_files import BadRecordError
from minigpt4.errors import DataError
from minigpt4.processing.pictures import DEFAULT_LIMITS
from tests.data.sources.source_files import picture, write

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CAPTIONS = [f"picture number {number}" for number in range(7)]


def table(path: Path, rows: int = 2, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


PICTURES = [picture(number) for number in range(7)]
FORMS: dict[str, Any] = {
    "bytes": PICTURES,
    "structs": [{"bytes": data, "path": f"{number}.jpg"} for number, data in enumerate(PICTURES)],
    "structs of paths": [{"bytes": None, "path": f"pics/{number}.jpg"} for number in range(7)],
    "paths": [f"pics/{number}.jpg" for number in range(7)],
}


@pytest.mark.parametrize("form", FORMS)
def test_pictures_of_every_form_are_read(form: str, tmp_path: Path) -> None:
    for number, data in enumerate(PICTURES):
        write(tmp_path / "pics" / f"{number}.jpg", data)
    table(tmp_path / "data.parquet", image=FORMS[form], caption=CAPTIONS)

    source = open_source(tmp_path)

    assert len(source) == 7 and source.text_lengths is None and source.known_bad() == []
    for number in (6, 0, 3, 2, 2, 5):
        expected = Record(f"data.parquet:{number}", PICTURES[number], (("", CAPTIONS[number]),))
        assert source.read(number) == expected


def test_files_follow_each_other_and_those_for_testing_are_left_out(tmp_path: Path) -> None:
    table(tmp_path / "data" / "train-00001-of-00002.parquet", image=PICTURES[4:], text=CAPTIONS[4:])
    table(tmp_path / "data" / "train-00000-of-00002.parquet", image=PICTURES[:4], text=CAPTIONS[:4])
    table(tmp_path / "data" / "test-00000-of-00001.parquet", image=PICTURES, text=CAPTIONS)

    source = open_source(tmp_path)

    assert [source.read(number).turns[0][1] for number in range(len(source))] == CAPTIONS
    assert source.read(4).key == "data/train-00001-of-00002.parquet:0"
    assert [source.group(number) for number in (3, 4)] == [f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert source.skipped == {"file of another split": 1}


def test_one_row_group_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(table(tmp_path / "x.parquet", image=PICTURES, caption=CAPTIONS))
    assert isinstance(source, parquet.ParquetSource)
    opened: list[Path] = []
    plain = parquet.opened
    monkeypatch.setattr(parquet, "opened", lambda path: opened.append(path) or plain(path))

    for number in range(7):
        source.read(number)
        assert len(source._held) == 1

    assert len(opened) == 4  # groups of two


def test_source_goes_to_another_process_without_what_it_holds(tmp_path: Path) -> None:
    source = open_source(table(tmp_path / "x.parquet", image=PICTURES, caption=CAPTIONS))
    size = len(pickle.dumps(source))
    source.read(0)

    sent = pickle.dumps(source)

    assert len(sent) == size and pickle.loads(sent).read(3) == source.read(3)


def test_identity_follows_the_content(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", image=PICTURES, caption=CAPTIONS)
    before = open_source(path).identity

    assert open_source(path).identity == before
    table(path, image=PICTURES[:6], caption=CAPTIONS[:6])
    assert open_source(path).identity != before


@pytest.mark.parametrize(
    ("image", "caption", "words"),
    [
        (None, "a", "^x.parquet:0 has no picture"),
        (b"", "a", "^x.parquet:0 has no picture"),
        (b"x", None, "^x.parquet:0 has no caption"),
        (b"x", " ", "^x.parquet:0 has no caption"),
        (bytes(DEFAULT_LIMITS.max_bytes + 1), "a", "^x.parquet:0: the picture has 20,971,521 bytes"),
    ],
)
def test_bad_row_is_told_and_the_next_is_read(image: object, caption: object, words: str, tmp_path: Path) -> None:
    source = open_source(table(tmp_path / "x.parquet", image=[image, b"y"], caption=[caption, "b"]))

    with pytest.raises(BadRecordError, match=words):
        source.read(0)

    assert source.read(1).picture == b"y"


def test_path_that_leads_out_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "secret.jpg", b"x")

    with pytest.raises(BadRecordError, match="outside the folder"):
        open_source(table(tmp_path / "in" / "x.parquet", image=["../secret.jpg"], caption=["a"])).read(0)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": [b"x"], "words": ["a"]}, "has no column for the caption, expected caption or text"),
        ({"blob": [b"x"], "caption": ["a"]}, "has no column for the picture, expected image"),
        ({"image": [1], "caption": ["a"]}, "column image is int64, expected bytes, a file name"),
        ({"image": [b"x"], "caption": [[1]]}, "column caption is list<.*>, expected text or lists of text"),
        ({"image": [b"x"], "caption": [{"id": 1}]}, "column caption is struct<.*>, expected text"),
    ],
)
def test_columns_of_another_kind_are_refused(columns: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        open_source(table(tmp_path / "x.parquet", **columns))


def test_caption_column_may_be_named(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", image=[b"x"], caption=["a"], Long=["a long one"])

    assert open_source(path, text="long").read(0).turns == (("", "a long one"),)


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty", "body"])
def test_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", image=PICTURES, caption=CAPTIONS)
    content = path.read_bytes()
    garbled = b"PAR1" + b"\xff" * (len(content) // 2) + content[4 + len(content) // 2 :]
    path.write_bytes({"garbage": b"x" * 99, "cut": content[:-20], "empty": b"", "body": garbled}[damage])

    with pytest.raises(DataError, match=r"x\.parquet is not a parquet file, or it is damaged: .") as told:
        open_source(path).read(0)

    assert "\n" not in told.value.message


def test_missing_library_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "x.parquet", image=PICTURES, caption=CAPTIONS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)

    with pytest.raises(DataError, match=r"^parquet files need pyarrow$") as told:
        open_source(path)

    assert told.value.hint == 'pip install "minigpt4[data]"'


def test_a_list_of_addresses_has_the_way_to_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.parquet has addresses of pictures and no pictures") as told:
        open_source(table(tmp_path / "x.parquet", URL=["http://a.example/1.jpg"], TEXT=["a cat"]))
    assert "img2dataset" in told.value.hint


@pytest.mark.parametrize("column", ["question", "conversations", "texts"])
def test_questions_and_conversations_are_not_taken_for_captions(column: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"has questions or conversations \(column {column}\)"):
        open_source(table(tmp_path / "x.parquet", image=[b"x"], **{column: ["a"], "answers": [["b"]]}))


def test_two_columns_of_a_name_are_refused(tmp_path: Path) -> None:
    columns = [pa.array([b"x"]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["image", "caption", "caption"]), tmp_path / "x.parquet")

    with pytest.raises(DataError, match="has more than one column caption"):
        open_source(tmp_path)
