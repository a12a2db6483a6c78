"""MiniGPT-4's second stage: `filter_cap.json` beside `image/ID.jpg`, captions raw."""

from pathlib import Path

import pytest

from minigpt4.data.record import Record
from minigpt4.data.sources import open_source
from minigpt4.data.sources.safe_files import BadRecordError
from minigpt4.errors import DataError
from tests.data.sources.source_files import picture, write

RAW = 'The "picture" shows:\n(a) A Cat; *asleep*. ###'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    annotations = [
        {"image_id": "2", "caption": RAW},
        {"image_id": 3, "caption": "another"},
        {"image_id": "4", "caption": "its picture is gone"},
        {"image_id": "../5", "caption": "outside"},
        {"image_id": "6"},
        {"caption": "nothing"},
        "text",
    ]
    write(tmp_path / "filter_cap.json", {"annotations": annotations})
    write(tmp_path / "5.jpg", picture())
    for number in (2, 3):
        write(tmp_path / "image" / f"{number}.jpg", picture(number))
    return tmp_path


@pytest.mark.parametrize("named", ["", "filter_cap.json"])
def test_pairs_are_read_with_raw_captions(named: str, folder: Path) -> None:
    source = open_source(folder / named)

    assert source.read(0) == Record("image/2.jpg", picture(2), (("", RAW),))
    assert source.read(1) == Record("image/3.jpg", picture(3), (("", "another"),))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (2, r"^image/4\.jpg: the picture '4\.jpg' is not in "),
        (3, r"outside the folder of the pictures$"),
        (4, r"^image/6\.jpg has no caption$"),
        (5, r"^filter_cap\.json:6 names no picture$"),
        (6, r"^filter_cap\.json:7 is not an object with image_id and caption$"),
    ],
)
def test_bad_pair_is_told(number: int, words: str, folder: Path) -> None:
    with pytest.raises(BadRecordError, match=words):
        open_source(folder).read(number)


def test_pictures_may_lie_elsewhere(folder: Path) -> None:
    (folder / "image").rename(folder / "photos")

    assert open_source(folder, images=folder / "photos").read(0).picture == picture(2)


@pytest.mark.parametrize("content", [[], {"annotations": {}}, {}, 7])
def test_list_of_another_form_is_refused(content: object, tmp_path: Path) -> None:
    write(tmp_path / "filter_cap.json", content)

    with pytest.raises(DataError, match=r"filter_cap\.json is not of the form"):
        open_source(tmp_path)


def test_list_without_records_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "filter_cap.json", {"annotations": []})

    with pytest.raises(DataError, match=r"filter_cap\.json names no records"):
        open_source(tmp_path)
