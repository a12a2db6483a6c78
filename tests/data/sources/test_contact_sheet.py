"""The contact sheet shows each picture where it belongs, with its words under it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from minigpt4.data.record import Record
from minigpt4.data.sources import contact_sheet
from minigpt4.data.sources.contact_sheet import COLUMNS, PICTURE, draw_contact_sheet, plain_words, write_contact_sheet
from minigpt4.errors import DataError
from tests.processing.picture_files import saved

COLOURS = ["red", "green", "blue", "yellow", "purple"]


def record(colour: str, caption: str, size: tuple[int, int] = (40, 30)) -> Record:
    return Record(f"{colour}.png", saved(Image.new("RGB", size, colour), "PNG"), (("", caption),))


def centres(page: Image.Image, count: int) -> list[tuple[int, ...]]:
    """The pixel in the middle of each picture."""
    rows = -(-count // COLUMNS)
    width, height = (page.width - 16) // COLUMNS, (page.height - 16) // rows
    places = [(16 + i % COLUMNS * width + PICTURE[0] // 2, 16 + i // COLUMNS * height + 150) for i in range(count)]
    return [page.getpixel(place) for place in places]  # type: ignore[misc]


def ink(page: Image.Image) -> int:
    return int((np.asarray(page.convert("L")) < 100).sum())


def test_pictures_stand_four_in_a_row_in_their_order() -> None:
    page = draw_contact_sheet([record(colour, "x") for colour in COLOURS])

    expected = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in COLOURS]
    assert centres(page, 5) == expected


def test_words_are_written_and_longer_ones_take_more_lines() -> None:
    short, long = (draw_contact_sheet([record("white", text)]) for text in ("a cat", "a cat on a mat " * 8))

    assert 0 < ink(short) < ink(long)
    assert short.height < long.height
    assert draw_contact_sheet([record("white", "a cat " * 500)]).height < 400  # cut off, with dots


def test_what_a_font_cannot_show_and_hostile_words_are_no_error() -> None:
    for text in ("a\0b\x1b[31m\ud800", "\N{SNOWMAN}" * 50, "x" * 5000, "\n\n", "\u202eabc"):
        draw_contact_sheet([record("red", text)])


def test_extreme_sides_and_text_alone_are_drawn() -> None:
    page = draw_contact_sheet([record("red", "thin", (1, 900)), Record("text", None, (("q", "a"),))])

    assert page.width < 1300


def test_words_are_those_of_the_given_function() -> None:
    assert plain_words(Record("k", None, (("", "caption"), ("q", "a")))) == "caption\nq - a"
    assert ink(draw_contact_sheet([record("white", "x")], lambda _: "many words here")) > ink(
        draw_contact_sheet([record("white", "x")])
    )


def test_file_is_written_whole(tmp_path: Path) -> None:
    write_contact_sheet(tmp_path / "new" / "sheet.png", [record("red", "x")])

    with Image.open(tmp_path / "new" / "sheet.png") as page:
        assert page.format == "PNG"
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_nothing_to_show_is_a_sentence() -> None:
    with pytest.raises(DataError, match="no sound record"):
        draw_contact_sheet([])


@pytest.mark.skipif(len(contact_sheet._fonts()) == 1, reason="this system has no fonts")
@pytest.mark.parametrize("letters", ["\xe9\xfc\xf1", "\u0436\u0444\u044b"])
def test_letters_beyond_ascii_are_written_where_the_system_has_a_font(letters: str) -> None:
    drawn = {draw_contact_sheet([record("white", letter * 9)]).tobytes() for letter in letters}

    assert len(drawn) == len(letters)  # not the same box for each of them


def test_plain_words_are_written_in_the_same_font_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    here = draw_contact_sheet([record("white", "a cat")]).tobytes()
    monkeypatch.setattr(contact_sheet, "_fonts", lambda: [ImageFont.load_default(13)])

    assert draw_contact_sheet([record("white", "a cat")]).tobytes() == here
