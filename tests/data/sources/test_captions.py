"""A folder of pictures with captions, in every usual form; what has no partner is counted and not passed over."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt4.data.record import Record, Source
from minigpt4.data.sources import open_source
from minigpt4.data.sources.checking import check_source
from minigpt4.data.sources.safe_files import BadRecordError
from minigpt4.errors import DataError
from tests.data.sources.source_files import picture, write


def faults(source: Source) -> dict[str, str]:
    """The sentence of each bad record, by its kind."""
    found = {}
    for number in range(len(source)):
        try:
            source.read(number)
        except BadRecordError as error:
            found[error.kind] = error.message
    return found


def good(source: Source) -> list[Record]:
    bad = set(source.known_bad())
    return [source.read(number) for number in range(len(source)) if number not in bad]


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        write(folder / name, picture(number))


ROWS = [{"file_name": "cat.jpg", "caption": "a cat, asleep"}, {"file_name": "dog.png", "caption": "zwei H\xfcnde"}]
LINES = '{"file_name": "cat.jpg", "caption": "a cat, asleep"}\n\n{"file_name": "dog.png", "caption": "zwei H\xfcnde"}'
TABLES: dict[str, tuple[str, Any]] = {
    "csv": ("captions.csv", 'file_name,caption\ncat.jpg,"a cat, asleep"\ndog.png,zwei H\xfcnde\n'),
    "csv with a mark, capitals and Windows lines": (
        "captions.csv", '\ufeffImage,Title\r\ncat.jpg,"a cat, asleep"\r\ndog.png,zwei H\xfcnde\r\n',
    ),
    "csv with semicolons": ("captions.csv", "file;text\ncat.jpg;a cat, asleep\ndog.png;zwei H\xfcnde\n"),
    "tsv": ("captions.tsv", "path\tcaption\ncat.jpg\ta cat, asleep\ndog.png\tzwei H\xfcnde\n"),
    "ids": ("captions.csv", 'image_id,caption\ncat,"a cat, asleep"\ndog,zwei H\xfcnde\n'),
    "json": ("captions.json", ROWS),
    "json object": ("captions.json", {row["file_name"]: row["caption"] for row in ROWS}),
    "coco": (
        "captions.json",
        {
            "images": [{"id": 7, "file_name": "cat.jpg"}, {"id": 8, "file_name": "dog.png"}],
            "annotations": [{"image_id": 7, "id": 1, "caption": "a cat, asleep"},
                            {"image_id": 8, "id": 2, "caption": "zwei H\xfcnde"}],
        },
    ),
    "jsonl": ("captions.jsonl", LINES),
    "a hub's": ("metadata.jsonl", LINES),
}  # fmt: skip


@pytest.mark.parametrize("form", TABLES)
def test_tables_of_every_form_say_the_same(form: str, tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg", "dog.png")
    name, content = TABLES[form]
    write(tmp_path / name, content)

    source = open_source(tmp_path)

    assert good(source) == [
        Record("cat.jpg", picture(0), (("", "a cat, asleep"),)),
        Record("dog.png", picture(1), (("", "zwei H\xfcnde"),)),
    ]
    assert len(source) == 2
    assert list(source.text_lengths or ()) == [13, 11]
    assert source.group(0) == name


def test_text_beside_each_picture(tmp_path: Path) -> None:
    pictures(tmp_path, "a/cat.jpg", "b/cat.jpg", "b/alone.jpg")
    for name, text in (("a/cat.txt", "\ufeffa cat\n"), ("b/cat.txt", "another cat"), ("b/lost.txt", "lost")):
        write(tmp_path / name, text)

    source = open_source(tmp_path)

    assert [(record.key, record.turns[0][1]) for record in good(source)] == [
        ("a/cat.jpg", "a cat"), ("b/cat.jpg", "another cat"),
    ]  # fmt: skip
    assert faults(source) == {
        "no text": "b/alone.jpg has no caption, expected b/alone.txt",
        "no picture": "b/lost.txt has no picture of its name",
    }


def test_pictures_of_every_kind_that_is_opened_are_found(tmp_path: Path) -> None:
    for number, kind in enumerate(["JPEG", "PNG", "WebP", "GIF", "BMP"]):
        write(tmp_path / f"{number}.{kind.lower()}", picture(number, kind))
        write(tmp_path / f"{number}.txt", kind)
    write(tmp_path / "t.tif", b"II")
    write(tmp_path / "t.txt", "no picture that is read")

    check = check_source(open_source(tmp_path))

    assert check.good == 5
    assert check.faults["no picture"].examples == [
        "t.txt has no picture of its name, but t.tif; read are .jpg, .jpeg, .png, .webp, .gif, .bmp"
    ]


def test_row_without_picture_and_picture_without_row_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg", "images/dog.jpg", "unnamed.jpg")
    write(tmp_path / "captions.csv", "image,caption\ncat.jpg,a cat\ndog,a dog\ngone.jpg,gone\ncat.jpg,\n,words\n")

    source = open_source(tmp_path)

    assert [record.key for record in good(source)] == ["cat.jpg", "images/dog.jpg"]
    assert len(source) == 6 and len(source.known_bad()) == 4
    assert faults(source) == {
        "picture that is missing": "captions.csv:4: the picture 'gone.jpg' is not there",
        "no picture": "captions.csv:6 names no picture",
        "no text": "unnamed.jpg has no caption, captions.csv does not name it",
    }


def test_a_table_in_large_letters_is_a_folders_table(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg", "unnamed.jpg")
    write(tmp_path / "Captions.CSV", "image,caption\ncat.jpg,a cat\n")

    source = open_source(tmp_path)

    assert [record.key for record in good(source)] == ["cat.jpg"]
    assert faults(source) == {"no text": "unnamed.jpg has no caption, Captions.CSV does not name it"}


def test_a_text_in_large_letters_is_a_pictures_text(tmp_path: Path) -> None:
    pictures(tmp_path, "CAT.JPG")
    for name in ("CAT.TXT", "LOST.TXT"):
        write(tmp_path / name, "a cat")

    source = open_source(tmp_path)

    assert [record.turns[0][1] for record in good(source)] == ["a cat"]
    assert faults(source) == {"no picture": "LOST.TXT has no picture of its name"}


def test_a_picture_named_in_other_letters_is_pointed_at(tmp_path: Path) -> None:
    pictures(tmp_path, "Cat.JPG", "images/dog.jpg")
    write(
        tmp_path / "captions.csv",
        "\ufeffimage;caption\r\nCat.jpg;a cat\r\nDOG;a dog\r\ncow.jpg;a cow\r\nimages\\dog.jpg;it\r\n",
    )

    source = open_source(tmp_path)

    told = []
    for number in range(4):
        with pytest.raises(BadRecordError) as error:
            source.read(number)
        told.append(error.value.message)
    assert told == [
        "captions.csv:2: the picture 'Cat.jpg' is not there, but Cat.JPG is",
        "captions.csv:3: the picture 'DOG' is not there, but images/dog.jpg is",
        "captions.csv:4: the picture 'cow.jpg' is not there",
        "captions.csv:5: the picture 'images\\\\dog.jpg' is not there, but images/dog.jpg is",
    ]


@pytest.mark.parametrize(
    "content",
    [
        {"cat.jpg": ["a cat", "it sits", " "], "dog.jpg": "a dog"},
        [{"image": "cat.jpg", "captions": ["a cat", "it sits", None]}, {"image": "dog.jpg", "captions": "a dog"}],
    ],
)
def test_several_captions_of_a_picture_are_records_of_their_own(content: object, tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg", "dog.jpg")

    source = open_source(write(tmp_path / "list.json", content))

    assert [(record.key, record.turns[0][1]) for record in good(source)] == [
        ("cat.jpg", "a cat"), ("cat.jpg", "it sits"), ("dog.jpg", "a dog"),
    ]  # fmt: skip
    assert list(faults(source)) == ["no text"]


def test_a_column_of_text_files_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    write(tmp_path / "cat.txt", "a cat")

    with pytest.raises(DataError, match="has captions in text files, so `text` changes nothing"):
        open_source(tmp_path, text="words")


def test_names_as_programs_write_them_are_read(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg", "a/dog.jpg", "images/cow.jpg")
    write(tmp_path / "captions.csv", "file,caption\n./cat.jpg,a cat\n./a//dog.jpg,a dog\n./cow,a cow\n")

    source = open_source(tmp_path)

    assert [record.key for record in good(source)] == ["cat.jpg", "a/dog.jpg", "images/cow.jpg"] and len(source) == 3


def test_a_name_that_looks_right_and_is_not_there_is_told_why(tmp_path: Path) -> None:
    pictures(tmp_path / "pics", unicodedata.normalize("NFD", "caf\xe9.jpg"), "dog.jpg")
    pictures(tmp_path / "elsewhere", "cow.jpg")
    (tmp_path / "pics/linked").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "pics/captions.csv", "file,caption\ncaf\xe9.jpg,a\nmy/pics/dog.jpg,a\nlinked/cow.jpg,a\n")

    source = open_source(tmp_path / "pics")

    told = []
    for number in range(3):
        with pytest.raises(BadRecordError) as error:
            source.read(number)
        told.append(error.value.message.partition("is not there, ")[2])
    assert told == [
        unicodedata.normalize("NFD", "but caf\xe9.jpg is"),
        "but dog.jpg is",
        "and linked is a link to a folder, which is not followed",
    ]


def test_pictures_may_lie_elsewhere(tmp_path: Path) -> None:
    pictures(tmp_path / "photos", "cat.jpg", "other.jpg")
    table = write(tmp_path / "list" / "mine.csv", "file,caption\ncat.jpg,a cat\ngone.jpg,gone\n")

    source = open_source(table, images=tmp_path / "photos")

    assert source.read(0).picture == picture(0)
    with pytest.raises(BadRecordError, match=r"the picture 'gone\.jpg' is not in .*photos"):
        source.read(1)
    assert len(source) == 2  # the other pictures of that folder are none of the list's


def test_another_column_may_hold_the_caption(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    write(tmp_path / "captions.csv", "file,caption,Long\ncat.jpg,a cat,a long cat\n")

    assert open_source(tmp_path, text="long").read(0).turns == (("", "a long cat"),)


def test_a_table_with_neither_column_is_told_of_both_at_once(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    write(tmp_path / "captions.csv", "\ufeffBild;Text dazu\r\ncat.jpg;a cat\r\n")

    with pytest.raises(
        DataError, match=r"for the picture, .* and no column for the caption, .* has Bild, Text"
    ) as told:
        open_source(tmp_path)
    assert told.value.hint == (
        "rename a column to file_name and caption, or name the caption's column with `text` (--text)"
    )


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (
            "name,caption",
            "has no column for the picture, expected file_name or filename or .*, but it has name, caption",
        ),
        ("file,words", "has no column for the caption, expected caption or text or .*, but it has file, words"),
    ],
)
def test_table_without_the_columns_is_refused(header: str, words: str, tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    write(tmp_path / "captions.csv", f"{header}\ncat.jpg,a cat\n")

    with pytest.raises(DataError, match=words):
        open_source(tmp_path)


LINE = '{"file": "cat.jpg", "caption": "a cat"}\n'
BAD_LINES = {
    "line that is not JSON": "{\n",
    "text of another kind": "[1]\n",
    "no text": '{"file": "cat.jpg", "caption": null}\n',
    "no picture": '{"file": 1.5, "caption": "a"}\n',
    "text that is too long": " " * 2**21 + "\n",
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_counted_and_those_round_it_are_read(kind: str, tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    write(tmp_path / "captions.jsonl", LINE + BAD_LINES[kind] + LINE)

    source = open_source(tmp_path)

    assert list(faults(source)) == [kind]
    assert source.known_bad() == [1] and len(source) == 3


def test_first_row_may_be_the_bad_one(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    write(tmp_path / "captions.jsonl", '{"file": "cat.jpg"}\n' + LINE)

    source = open_source(tmp_path)

    assert source.known_bad() == [0] and source.read(1).turns == (("", "a cat"),)


def test_field_of_a_megabyte_in_a_table_is_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    write(tmp_path / "captions.csv", f"file,caption\ncat.jpg,{'x' * 2**20}\ncat.jpg,a cat\n")

    source = open_source(tmp_path)

    assert "text that is too long" in faults(source)
    assert [record.turns[0][1] for record in good(source)] == ["a cat"]


@pytest.mark.parametrize(
    ("suffix", "mark", "name"), [("csv", ",", "a comma"), ("csv", ";", "a semicolon"), ("tsv", "\t", "a tab")]
)
def test_a_caption_that_a_delimiter_cuts_in_two_is_not_learnt_in_part(
    suffix: str, mark: str, name: str, tmp_path: Path
) -> None:
    pictures(tmp_path, "cat.jpg")
    lines = ["file|caption", "cat.jpg|a cat| and a dog", 'cat.jpg|"a cat| red"', "cat.jpg|b||"]
    write(tmp_path / f"captions.{suffix}", "\n".join(lines).replace("|", mark))

    source = open_source(tmp_path)

    said = f"the row has 3 fields and the table 2 columns, a caption with {name} needs quotes"
    assert faults(source) == {"text of another kind": f"captions.{suffix}:2: {said}"}
    assert [record.turns[0][1] for record in good(source)] == [f"a cat{mark} red", "b"]


@pytest.mark.parametrize("lines", ['cat.jpg,"a cat', 'cat.jpg,"a cat\ncat.jpg,a "red" dog'])
def test_a_quote_that_is_not_closed_makes_no_caption_of_the_rows_below_it(lines: str, tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    whole = 'cat.jpg,"two\r\nlines ""here"" are well"'
    write(tmp_path / "captions.csv", f"file,caption\n{whole}\n{lines}\ncat.jpg,a dog\n")

    source = open_source(tmp_path)

    assert "lines are one row, as a quote opens there that is not closed" in faults(source)["text of another kind"]
    texts = [record.turns[0][1] for record in good(source)]
    assert texts[0] == 'two\r\nlines "here" are well'
    assert not any("cat.jpg" in text for text in texts)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "not UTF-8": ("captions.csv", b"file,caption\ncat.jpg,\xff\n", "is not UTF-8"),
    "no first line": ("captions.csv", "x" * 2**18 + ",caption\n", "its first line cannot be read"),
    "not JSON": ("captions.json", "[1,", "is not JSON: "),
    "deep JSON": ("captions.json", "[" * 10**5, "is nested too deep"),
    "a number": ("captions.json", "7", "is neither a list nor an object"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_table_that_cannot_be_read_is_refused(fault: str, tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    name, content, words = REFUSED[fault]
    write(tmp_path / name, content)

    with pytest.raises(DataError, match=words):
        open_source(tmp_path)


def test_lines_of_json_under_another_ending_have_the_cure(tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    write(tmp_path / "captions.json", LINE + LINE)

    with pytest.raises(DataError, match="is not JSON: Extra data") as told:
        open_source(tmp_path)
    assert "name the file .jsonl" in told.value.hint


def swap_words(folder: Path) -> object:
    return write(folder / "captions.csv", "file,caption\ncat.jpg,a dog\n")


@pytest.mark.parametrize(
    "change", [swap_words, lambda folder: write(folder / "cat.jpg", picture(1, "PNG"))], ids=["words", "picture"]
)
def test_identity_follows_words_and_pictures(change: Callable[[Path], object], tmp_path: Path) -> None:
    pictures(tmp_path, "cat.jpg")
    write(tmp_path / "captions.csv", "file,caption\ncat.jpg,a cat\n")
    before = open_source(tmp_path).identity
    assert open_source(tmp_path).identity == before

    change(tmp_path)

    assert open_source(tmp_path).identity != before


def test_a_picture_named_by_its_whole_path_is_counted_once(tmp_path: Path) -> None:
    pictures(tmp_path, "a/cat.jpg")
    write(tmp_path / "captions.csv", f"file,caption\n{tmp_path}/a/cat.jpg,a cat\n")

    source = open_source(tmp_path)

    assert len(source) == 1 and list(faults(source)) == ["picture named by its whole path"]
