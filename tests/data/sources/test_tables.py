"""Tables of captions as data sets publish them: Flickr8k, Flickr30k, Karpathy's lists, captions in lists."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from minigpt4.data.record import Source
from minigpt4.data.sources import open_source
from minigpt4.data.sources.checking import check_source
from minigpt4.data.sources.safe_files import BadRecordError
from minigpt4.errors import DataError
from tests.data.sources.source_files import picture, write

FLICKR8K = 'image,caption\n1.jpg,A child climbs .\n1.jpg,"A girl , in pink , climbs ."\n2.jpg,A dog .\n'
FLICKR30K = (
    "image_name| comment_number| comment\n1.jpg| 0| Two men , one with a hat .\n1.jpg| 1| They look at \" it \" .\n"
    "2.jpg| 4   A dog runs .\n2.jpg| 0| A dog .\n"
)  # fmt: skip


def said(source: Source) -> list[tuple[str, str]]:
    """Each sound record's name and words."""
    bad = set(source.known_bad())
    records = [source.read(number) for number in range(len(source)) if number not in bad]
    return [(record.key, record.turns[0][1]) for record in records]


def told(source: Source) -> list[str]:
    sentences = []
    for number in source.known_bad():
        with pytest.raises(BadRecordError) as error:
            source.read(number)
        sentences.append(error.value.message)
    return sentences


def pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        write(folder / name, picture(number))


@pytest.mark.parametrize("place", ["", "captions.txt"])
def test_flickr8k_is_read_as_it_is_unpacked(place: str, tmp_path: Path) -> None:
    pictures(tmp_path, "Images/1.jpg", "Images/2.jpg")
    write(tmp_path / "captions.txt", FLICKR8K)

    source = open_source(tmp_path / place)

    assert said(source) == [
        ("Images/1.jpg", "A child climbs ."),
        ("Images/1.jpg", "A girl , in pink , climbs ."),
        ("Images/2.jpg", "A dog ."),
    ]
    assert len(source) == 3


@pytest.mark.parametrize("place", ["", "results.csv"])
def test_flickr30k_is_read_and_its_row_without_a_bar_is_one_bad_record(place: str, tmp_path: Path) -> None:
    pictures(tmp_path, "flickr30k_images/1.jpg", "flickr30k_images/2.jpg")
    write(tmp_path / "results.csv", FLICKR30K)

    source = open_source(tmp_path / place)

    assert said(source) == [
        ("flickr30k_images/1.jpg", "Two men , one with a hat ."),
        ("flickr30k_images/1.jpg", 'They look at " it " .'),
        ("flickr30k_images/2.jpg", "A dog ."),
    ]
    assert told(source) == ["results.csv:4 (2 of 3 fields) (2.jpg) has no caption"]


def test_a_picture_whose_only_row_is_bad_is_counted_once(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{name}.jpg" for name in "abcdef"))
    rows = ["a.jpg,a cat, asleep", "b.jpg,", "c.jpg," + "x" * 2**18, "d.jpg", "e.jpg,fine", 'f.jpg,"not closed']
    write(tmp_path / "captions.csv", "file,caption\n" + "\n".join(rows) + "\nz.jpg,gone\n")

    source = open_source(tmp_path)

    assert [sentence.split(" ")[0].rstrip(":") for sentence in told(source)] == [
        f"captions.csv:{line}" for line in (2, 3, 4, 5, 8)
    ]  # fmt: skip
    assert said(source) == [("e.jpg", "fine")]


def test_a_picture_that_no_row_names_is_still_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "Images/1.jpg", "Images/2.jpg", "Images/3.jpg")
    write(tmp_path / "captions.txt", FLICKR8K)

    assert told(open_source(tmp_path)) == ["Images/3.jpg has no caption, captions.txt does not name it"]


def test_texts_beside_pictures_stay_texts_whatever_they_are_called(tmp_path: Path) -> None:
    pictures(tmp_path, "captions.jpg", "cat.jpg")
    for name, text in (("captions.txt", "a page, full of captions"), ("cat.txt", "a cat"), ("results.csv", "a,b\n")):
        write(tmp_path / name, text)

    source = open_source(tmp_path)

    assert said(source) == [("captions.jpg", "a page, full of captions"), ("cat.jpg", "a cat")]


def test_a_folder_of_any_name_that_has_the_pictures_is_looked_into(tmp_path: Path) -> None:
    pictures(tmp_path, "train2017/0007.jpg", "train2017/0008.jpg")
    write(tmp_path / "captions.json", {"0007.jpg": "a cat", "train2017/0008.jpg": "a dog"})

    assert said(open_source(tmp_path)) == [("train2017/0007.jpg", "a cat"), ("train2017/0008.jpg", "a dog")]


def test_of_several_folders_with_pictures_none_is_guessed(tmp_path: Path) -> None:
    pictures(tmp_path, "new/1.jpg", "old/1.jpg")
    write(tmp_path / "captions.json", {"1.jpg": "a cat"})

    assert told(open_source(tmp_path))[0] == "captions.json:1.jpg: the picture '1.jpg' is not there"


KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014", "filename": "1.jpg", "split": "restval",
            "sentences": [{"tokens": ["a", "cat"], "raw": "A cat."}, {"tokens": [], "raw": "It sits."}],
        },
        {"filepath": "train2014", "filename": "1.jpg", "split": "train", "sentences": [{"raw": "A dog."}]},
        {"filepath": "val2014", "filename": "2.jpg", "split": "test", "sentences": [{"raw": "A cow."}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("place", ["", "dataset_coco.json"])
def test_karpathys_lists_are_read_without_what_is_for_testing(place: str, tmp_path: Path) -> None:
    pictures(tmp_path, "train2014/1.jpg", "val2014/1.jpg", "val2014/2.jpg")
    write(tmp_path / "dataset_coco.json", KARPATHY)

    source = open_source(tmp_path / place)

    assert said(source) == [("val2014/1.jpg", "A cat."), ("val2014/1.jpg", "It sits."), ("train2014/1.jpg", "A dog.")]
    assert source.skipped == {"row of another split": 1}
    assert len(source) == 3


def test_the_same_lists_may_name_pictures_of_one_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "1.jpg", "2.jpg")
    path = write(tmp_path / "dataset_coco.json", KARPATHY)

    assert [key for key, _ in said(open_source(path))] == ["images/1.jpg"] * 3
    assert check_source(open_source(path, images=tmp_path / "images")).good == 3


def test_rows_for_testing_alone_are_read_and_their_pictures_are_named(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg")
    rows = ["a.jpg,a cat,train", "b.jpg,a dog,test"]
    write(tmp_path / "captions.csv", "\n".join(["file,caption,split", *rows]))
    source = open_source(tmp_path)
    assert said(source) == [("a.jpg", "a cat")] and source.skipped == {"row of another split": 1} and len(source) == 1

    write(tmp_path / "captions.csv", "\n".join(["file,caption,split", rows[1]]))
    source = open_source(tmp_path / "captions.csv")
    assert said(source) == [("b.jpg", "a dog")] and source.skipped == {}


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ('"[""a cat"", ""it\'s \\ud83d\\udc08""]"', ["a cat", "it's \U0001f408"]),
        ('"[\'a cat\', ""it\'s \\d""]"', ["a cat", "it's \\d"]),
        ("['a cat'] is written on it", ["['a cat'] is written on it"]),
        ("['a', 1]", ["['a', 1]"]),
    ],
)
def test_a_list_in_a_field_of_a_csv_is_several_captions(field: str, expected: Sequence[str], tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg")
    table = write(tmp_path / "list.csv", f"raw;filename\n{field};a.jpg\n")

    assert [words for _, words in said(open_source(table))] == list(expected)


def test_a_bad_caption_of_a_list_leaves_those_behind_it(tmp_path: Path) -> None:
    pictures(tmp_path, "a.jpg", "b.jpg")
    content = [{"image": "a.jpg", "captions": ["a cat", None, "it sits"]}, {"image": "b.jpg", "captions": []}]

    source = open_source(write(tmp_path / "list.json", content))

    assert said(source) == [("a.jpg", "a cat"), ("a.jpg", "it sits")]
    assert told(source) == ["list.json:1 (a.jpg) has no caption", "list.json:2 (b.jpg) has no caption"]


def test_a_text_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a source of examples"):
        open_source(write(tmp_path / "notes.txt", "one, two\nthree\n"))


@pytest.mark.parametrize("name", ["Flickr8k.token.txt", "results_20130124.token"])
@pytest.mark.parametrize("as_file", [False, True])
def test_the_older_lists_of_flickr_are_read(name: str, as_file: bool, tmp_path: Path) -> None:
    pictures(tmp_path, "Flicker8k_Dataset/1.jpg", "Flicker8k_Dataset/2.jpg")
    path = write(tmp_path / name, '1.jpg#0\tA cat , "red" .\n1.jpg.1#0\tA cow .\nno line\n\n2.jpg#4\tA dog .\n')

    source = open_source(path if as_file else tmp_path)

    assert said(source) == [("Flicker8k_Dataset/1.jpg", 'A cat , "red" .'), ("Flicker8k_Dataset/2.jpg", "A dog .")]
    assert told(source) == [
        f"{name}:2: the picture '1.jpg.1' is not there",
        f"{name}:3 is not a picture's name with #, a tab and a caption",
    ]


ADDRESSES = {
    "named columns": "caption\turl\na cat\thttps://a.example/1.jpg\n",
    "CC3M": "a cat\thttps://a.example/1.jpg\na dog\thttps://a.example/2.jpg\n",
}


@pytest.mark.parametrize("form", ADDRESSES)
def test_a_list_of_addresses_has_the_way_to_pictures(form: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list\.tsv has addresses of pictures and no pictures") as error:
        open_source(write(tmp_path / "list.tsv", ADDRESSES[form]))
    assert "img2dataset" in error.value.hint


def test_pictures_named_by_addresses_are_told_as_such(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "list.csv", "image,caption\nhttps://a.example/1.jpg,a cat\n"))

    assert told(source) == [
        "list.csv:2: 'https://a.example/1.jpg' is an address, and pictures are read from this machine's disks"
    ]


def test_a_table_without_names_of_columns_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the first line of .* is a row, .*: 1\.jpg, a cat") as error:
        open_source(write(tmp_path / "list.csv", "1.jpg,a cat\n2.jpg,a dog\n"))
    assert error.value.hint == "write a line above it, such as file_name,caption"


def test_two_columns_of_a_name_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg")

    with pytest.raises(DataError, match="has more than one column caption"):
        open_source(write(tmp_path / "list.csv", "image,caption,Caption\n1.jpg,a cat,a dog\n"))
    assert said(open_source(write(tmp_path / "list.csv", "image,caption,x,x,,\n1.jpg,a cat,,,,\n"))) == [
        ("1.jpg", "a cat")
    ]


def test_a_picture_that_stands_twice_in_an_object_has_both_captions(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg", "2.jpg")
    path = write(tmp_path / "list.json", '{"1.jpg": {"caption": "a cat"}, "2.jpg": "a dog", "1.jpg": "it sits"}')

    source = open_source(path, format="captions")

    assert said(source) == [("1.jpg", "a cat"), ("2.jpg", "a dog"), ("1.jpg", "it sits")]


def test_textcaps_is_read(tmp_path: Path) -> None:
    pictures(tmp_path, "train_images/1.jpg")
    item = {"image_id": "1", "image_path": "train/1.jpg", "caption_str": "a sign", "reference_strs": ["a sign"]}

    source = open_source(write(tmp_path / "TextCaps.json", {"dataset_name": "textcaps", "data": [item]}))

    assert told(source) == ["TextCaps.json:1: the picture 'train/1.jpg' is not there, but train_images/1.jpg is"]


def test_rows_of_nothing_but_delimiters_are_none(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg")

    source = open_source(write(tmp_path / "list.csv", "image;caption\r\n;;\r\n1.jpg;a cat\r\n;;\r\n;\r\n"))

    assert said(source) == [("1.jpg", "a cat")] and len(source) == 1


def test_blanks_round_a_pictures_name_are_none_of_it(tmp_path: Path) -> None:
    pictures(tmp_path, "1.jpg", " 2.jpg")

    table = write(tmp_path / "list.csv", "caption,image\na cat, 1.jpg \na dog, 2.jpg\n")

    assert said(open_source(table)) == [("1.jpg", "a cat"), (" 2.jpg", "a dog")]
