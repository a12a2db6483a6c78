"""What a path is, is told by what lies there; nothing runs and nothing is fetched because of a path."""

import os
import pickle
import re
from pathlib import Path

import pytest

from minigpt4.data.sources import lists, open_source
from minigpt4.data.sources.formats import FORMATS, NAMES, recognise
from minigpt4.errors import DataError
from tests.data.sources.source_files import picture, samples, shard, write

TALK = [{"image": "a.jpg", "conversations": []}]
QUESTION = [{"image": "a.jpg", "question": "q", "answer": "a"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"0.tar": b"", "0.parquet": b"", "captions.csv": b""}, ("shards", "")),
        ({"filter_cap.json": b"{}", "image/1.jpg": b""}, ("alignment", "")),
        ({"captions.jsonl": b"", "a.jpg": b""}, ("captions", "")),
        ({"metadata.csv": b"", "a.jpg": b""}, ("captions", "")),
        ({"Captions.CSV": b"", "a.jpg": b""}, ("captions", "")),
        ({"a.jpg": b"", "a.txt": b""}, ("captions", "")),
        ({"deep/a.jpg": b"", "deep/a.txt": b""}, ("captions", "")),
        ({"mine.csv": b"", "a.jpg": b""}, ("captions", "mine.csv")),
        ({"mine.json": [{"image": "a.jpg", "caption": "a"}]}, ("captions", "mine.json")),
        ({"coco.json": {"images": [], "annotations": []}}, ("captions", "coco.json")),
        ({"data/a.parquet": b""}, ("parquet", "")),
        ({"data/0.tar": b"", "data/0.parquet": b""}, ("shards", "")),
        (
            {"train/metadata.csv": b"", "train/a.jpg": b"", "test/metadata.csv": b"", "README.txt": b""},
            ("captions", "train"),
        ),
        ({"data/train/Metadata.jsonl": b"", "data/val/metadata.jsonl": b""}, ("captions", "data/train")),
        ({"0.parquet": b"", "0/1.jpg": b"", "0/1.txt": b"", "0/1.json": b"{}"}, ("captions", "")),
        ({"a.parquet": b"", "a.jpg": b"", "README.txt": b""}, ("parquet", "")),
        ({"talk.json": TALK, "a.jpg": b""}, ("conversations", "talk.json")),
        ({"vqa.json": QUESTION, "a.jpg": b""}, ("vqa", "vqa.json")),
        ({"gqa.json": {"1": QUESTION[0]}}, ("vqa", "gqa.json")),
        ({"train_questions.json": b"", "train_annotations.json": b""}, ("vqa", "")),
    ],
)
def test_folder_is_recognised(files: dict[str, object], expected: tuple[str, str], tmp_path: Path) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)

    assert recognise(tmp_path) == (expected[0], tmp_path / expected[1])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.tar", b"", "shards"),
        ("x.parquet", b"", "parquet"),
        ("x.csv", b"", "captions"),
        ("x.json", {"annotations": []}, "alignment"),
        ("x.json", {"annotations": [], "images": []}, "captions"),
        ("x.json", {"a.jpg": "a cat"}, "captions"),
        ("x.json", {"questions": []}, "vqa"),
        ("x.json", {"dataset_name": "textvqa", "data": QUESTION}, "vqa"),
        ("x.json", {"dataset_name": "textcaps", "data": [{"image_id": "a"}]}, "captions"),
        ("x.json", {"images": [{"filename": "a.jpg", "sentences": []}], "dataset": "coco"}, "captions"),
        ("x.txt", "image,caption\na.jpg,a cat\n", "captions"),
        ("x.jsonl", '{"image": "a.jpg", "question": "q"}', "vqa"),
        ("x.jsonl", '{"file_name": "a.jpg", "text": "q"}', "captions"),
        ("x.json", TALK, "conversations"),
    ],
)
def test_file_is_recognised(name: str, content: object, expected: str, tmp_path: Path) -> None:
    assert recognise(write(tmp_path / name, content))[0] == expected


@pytest.mark.parametrize(
    "files", [{"a.jpg": b"", "b.md": b""}, {"a.txt": b""}, {"x.json": [1]}, {"a.json": TALK, "b.json": TALK}]
)
def test_what_is_no_source_is_refused_with_what_was_looked_for(files: dict[str, object], tmp_path: Path) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)

    with pytest.raises(
        DataError,
        match=r"is not a source of examples, expected \*\.tar \(shards\), \*\.parquet ",
    ):
        open_source(tmp_path)


def test_tables_in_several_folders_are_told(tmp_path: Path) -> None:
    for name in ("cats", "dogs", "test"):
        write(tmp_path / name / "captions.csv", b"")

    with pytest.raises(DataError, match=r"has tables of captions in 2 folders: cats, dogs") as told:
        open_source(tmp_path)
    assert told.value.hint == "name each of them as a source of its own"


def test_a_folder_without_words_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is an empty folder, expected"):
        open_source(tmp_path)

    write(tmp_path / "deeper/a.JPG", b"")
    with pytest.raises(DataError, match="has pictures and no words to them") as told:
        open_source(tmp_path)
    assert told.value.hint == "write captions.csv with the columns file_name and caption"


@pytest.mark.parametrize(
    ("name", "content", "images", "text", "words"),
    [
        ("x.json", TALK, "nowhere", None, "nowhere is not a folder, expected that of the pictures"),
        ("x.json", TALK, None, "words", "so `text` changes nothing"),
        ("x.json", QUESTION, None, "words", "so `text` changes nothing"),
        ("x.tar", b"", ".", None, "so `images` changes nothing"),
    ],
)
def test_an_option_that_is_wrong_or_changes_nothing_is_refused(
    name: str, content: object, images: str | None, text: str | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        open_source(write(tmp_path / name, content), images=images, text=text)


@pytest.mark.parametrize("name", ["0.tar.gz", "0.TGZ"])
def test_compressed_archives_are_told_apart(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, b"")

    for given in (path, tmp_path):
        with pytest.raises(DataError, match=r"compressed archives?, expected a plain tar") as told:
            open_source(given)
        assert "gunzip" in told.value.hint


@pytest.mark.parametrize("name", ["x.txt", "x.json"])
def test_file_that_is_no_source_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a source of examples"):
        open_source(write(tmp_path / name, b"7"))


@pytest.mark.parametrize(
    "path",
    [
        "pipe:curl -s http://x/{0..9}.tar",
        "pipe:touch ran",
        "http://x/0.tar",
        "s3://bucket/x",
        "gs:bucket",
        "file:///x.tar",
    ],
)
def test_commands_and_addresses_are_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for format in ("auto", "shards"):
        with pytest.raises(DataError, match="is an address or a command"):
            open_source(path, format=format)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["auto", "shards", "captions", "alignment", "conversations", "vqa", "parquet"])
def test_missing_path_is_refused(format: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist|is not a file or folder"):
        open_source(tmp_path / "gone", format=format)


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the format 'csv' is not known, expected auto, shards, parquet") as told:
        open_source(tmp_path, format="csv")

    assert told.value.hint == "leave it out and the source is recognised; a table (.csv, .tsv) is captions"


def test_the_table_of_formats_is_the_documentations_and_each_has_a_reader() -> None:
    docs = Path(__file__).resolve().parents[3].joinpath("docs/training.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", docs.partition("| format |")[2].partition("\n\n")[0], re.MULTILINE))

    assert named | {"auto"} == set(NAMES)
    assert all(callable(row.reader.sniff) and callable(row.reader.open_source) for row in FORMATS.values())


def test_named_format_is_taken_where_several_lie(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", samples(1))
    write(tmp_path / "captions.csv", "file,caption\na.jpg,a cat\n")
    write(tmp_path / "a.jpg", picture())

    assert open_source(tmp_path, format="captions").read(0).key == "a.jpg"
    assert open_source(tmp_path).read(0).key == "0.tar:000000000"


def test_path_with_a_colon_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("set:one") / "a.jpg", picture())
    write(Path("set:one") / "a.txt", "a cat")

    assert open_source("set:one").read(0).turns == (("", "a cat"),)


TOLD = {"human": "Q", "gpt": "A"}
LONG_LISTS = {
    "captions.csv": "file_name,caption\n" + "".join(f"{n}.jpg,picture {n}\n" for n in range(7)),
    "filter_cap.json": {"annotations": [{"image_id": n, "caption": "a"} for n in range(7)]},
    "talk.json": [{"image": "a.jpg", "conversations": [{"from": w, "value": v} for w, v in TOLD.items()]}] * 7,
    "vqa.json": [QUESTION[0]] * 7,
}


@pytest.mark.parametrize("name", LONG_LISTS)
def test_whoever_waits_for_a_long_list_is_told_and_nobody_of_a_short_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    write(tmp_path / name, LONG_LISTS[name])

    def tell(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    open_source(tmp_path / name, report=tell)
    assert told == []

    monkeypatch.setattr(lists, "ROWS_PER_REPORT", 3)
    source = open_source(tmp_path / name, report=tell)
    assert told == [(f"reading {name}", done, total) for done, total in ((3, 0), (6, 0), (7, 7))]
    assert len(pickle.loads(pickle.dumps(source))) == 7, "who waits stays here when the rows go to a reader"


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["annotations/coco.json", "train/1.jpg"], "name one of its lists (annotations/coco.json), and the"),
        ([f"{name}.csv" for name in "abcdef"], "name one of its lists (a.csv, b.csv, c.csv, d.csv, ...), and the"),
        (["Captions.xlsx", "1.jpg"], "save Captions.xlsx as captions.csv"),
        (["photos.zip"], "unpack photos.zip first"),
        (["one.json"], "name its format, or another path"),
    ],
)
def test_a_folder_that_is_no_source_has_a_cure(names: list[str], hint: str, tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / name, "[]")

    with pytest.raises(DataError, match="is not a source of examples") as told:
        open_source(tmp_path)
    assert told.value.hint.startswith(hint)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.csv")

    with pytest.raises(DataError, match=r"x\.csv is neither a file nor a folder"):
        open_source(tmp_path / "x.csv")


@pytest.mark.parametrize(("name", "content"), [("talk.json", [{**TALK[0]}]), ("vqa.json", QUESTION)])
def test_pictures_of_a_list_may_lie_in_the_one_folder_beside_it(name: str, content: object, tmp_path: Path) -> None:
    write(tmp_path / "train2017" / "a.jpg", picture())
    if name == "talk.json":
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
        content = [{"image": "a.jpg", "conversations": turns}]

    assert open_source(write(tmp_path / name, content)).read(0).picture == picture()
