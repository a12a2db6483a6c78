"""A look through a source counts what is there, what is broken and what repeats."""

from pathlib import Path

import pytest
from PIL import Image

from minigpt4.data.record import Record
from minigpt4.data.sources import checking, open_source
from minigpt4.data.sources.checking import CELL, COLUMNS, MARGIN, PICTURE, Spread, check_source, write_contact_sheet
from tests.data.sources.source_files import picture, sample, samples, shard, write
from tests.processing.picture_files import saved


def words(text: str) -> int:
    return len(text.split())


def test_sizes_lengths_and_faults_are_counted(tmp_path: Path) -> None:
    members = samples(5)
    members |= {"x.jpg": b"GIF8 no", "x.txt": b"broken", "y.txt": b"alone", **sample("z", "</s>", 1)}
    shard(tmp_path / "0.tar", members)

    check = check_source(open_source(tmp_path), count_tokens=words, max_text_tokens=3)

    assert (check.records, check.good, check.bad, check.sampled, check.seed) == (8, 6, 2, 8, None)
    assert check.widths == Spread(8, 10, 12) and check.heights == Spread(8, 8, 8)
    assert check.characters == Spread(4, 16, 16)
    assert check.tokens == Spread(2, 4, 4) and check.cut == 5  # three words and the end
    assert {kind: (fault.count, fault.examples) for kind, fault in check.faults.items()} == {
        "picture that cannot be opened": (
            1,
            ["0.tar:x: the picture is not a picture file, expected JPEG, PNG, WebP, GIF or BMP"],
        ),
        "no picture": (1, ["0.tar:y has no picture"]),
    }
    assert check.as_dict()["faults"]["no picture"] == {"count": 1, "examples": ["0.tar:y has no picture"]}


def test_first_three_of_a_fault_are_kept_and_the_most_frequent_come_first(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {"a.txt": b"x", **{f"{number}.jpg": b"x" for number in range(9)}})

    check = check_source(open_source(tmp_path))

    assert [(kind, fault.count, len(fault.examples)) for kind, fault in check.faults.items()] == [
        ("no text", 9, 3), ("no picture", 1, 1),
    ]  # fmt: skip
    assert check.widths is None and check.samples == []


def test_repeated_pictures_and_records_are_counted(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {**sample("a", "one"), **sample("b", "two"), **sample("c", "one"), **sample("d", "x", 1)})

    check = check_source(open_source(tmp_path))

    assert (check.same_picture, check.same_record) == (2, 1)


def test_turns_and_text_alone_are_counted(tmp_path: Path) -> None:
    turn = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a b"}]
    write(tmp_path / "a.jpg", picture())
    path = write(tmp_path / "x.json", [{"conversations": turn * 2}, {"image": "a.jpg", "conversations": turn}])

    check = check_source(open_source(path), count_tokens=words)

    assert check.turns == {1: 1, 2: 1} and check.text_only == 1 and check.samples == [1]
    assert check.tokens == Spread(3, 6, 6) and check.cut is None


def test_of_a_large_source_a_seeded_sample_and_every_known_fault_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "ALL_UP_TO", 50)
    monkeypatch.setattr(checking, "SAMPLE", 10)
    members = {f"{number}.txt": b"alone" for number in range(7)}
    shard(tmp_path / "0.tar", {**samples(60), **members})
    source = open_source(tmp_path)
    read: list[int] = []

    check = check_source(source, seed=3, report=lambda what, done, total: read.append(total))

    assert (check.records, check.sampled, check.seed, check.known_bad) == (67, 10, 3, 7)
    assert check.faults["no picture"].count == 7
    assert check.good == read[0] - 7 <= 10
    assert check_source(source, seed=3) == check
    assert check_source(source, seed=4).samples != check.samples
    assert check_source(source, everything=True).good == 60


def test_the_share_of_what_is_bad_is_that_of_the_whole_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"{number}.txt": b"alone" for number in range(40)}
    broken = {f"b{number}.jpg": b"no picture" for number in range(100)}
    texts = {f"b{number}.txt": b"words" for number in range(100)}
    shard(tmp_path / "0.tar", {**samples(60), **members, **broken, **texts})
    source = open_source(tmp_path)
    assert check_source(source).bad_share == 140 / 200

    monkeypatch.setattr(checking, "ALL_UP_TO", 50)
    monkeypatch.setattr(checking, "SAMPLE", 50)
    check = check_source(source)

    others = check.good + check.faults["picture that cannot be opened"].count
    assert check.bad_share == (40 + check.faults["picture that cannot be opened"].count / others * 160) / 200


def test_shown_records_are_spread_over_the_source(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", samples(48))

    assert check_source(open_source(tmp_path)).samples == list(range(0, 48, 4))


def shown(path: Path, *records: Record) -> Image.Image:
    write_contact_sheet(path, records)
    with Image.open(path) as page:
        assert page.format == "PNG"
        return page.convert("RGB")


def of_colour(colour: str, caption: str = "a cat", size: tuple[int, int] = (40, 30)) -> Record:
    return Record(f"{colour}.png", saved(Image.new("RGB", size, colour), "PNG"), (("", caption),))


def test_pictures_of_a_contact_sheet_are_four_in_a_row_in_their_order(tmp_path: Path) -> None:
    colours = ["red", "green", "blue", "yellow", "purple"]

    page = shown(tmp_path / "new" / "sheet.png", *map(of_colour, colours))

    width, height = (side + MARGIN for side in CELL)
    corners = [(MARGIN + i % COLUMNS * width, MARGIN + i // COLUMNS * height) for i in range(len(colours))]
    expected = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours]
    assert [page.getpixel((x + PICTURE[0] // 2, y + 150)) for x, y in corners] == expected
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_words_of_a_contact_sheet_are_drawn_whatever_they_are(tmp_path: Path) -> None:
    pages = [
        shown(tmp_path / "sheet.png", of_colour("white", text))
        for text in (
            "a cat",
            "a cat on a mat " * 8,
            "a cat " * 500,
            "a\0b\x1b[31m\ud800",
            "\n\n",
            "\u202eabc",
            "x" * 5000,
        )
    ]
    pages.append(shown(tmp_path / "sheet.png", of_colour("white", size=(1, 900)), Record("text", None, (("q", "a"),))))

    assert len({page.size for page in pages}) == 1
    assert len({page.tobytes() for page in pages}) == len(pages)
