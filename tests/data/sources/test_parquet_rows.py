"""Parquet files whose rows are not one record each: lists of captions, and rows that are for testing."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from minigpt4.data.batches import SourceBatches
from minigpt4.data.examples import Layout
from minigpt4.data.order import Order
from minigpt4.data.sources import lists, open_source, parquet, parquet_rows
from minigpt4.data.sources.by_picture import by_picture
from minigpt4.data.sources.checking import check_source
from minigpt4.data.sources.safe_files import BadRecordError
from minigpt4.errors import ConfigError, DataError
from tests import tiny_chat
from tests.data.sources.source_files import picture

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SAID = [["a cat", "it sits"], ["a dog"], ["a cow", "it stands", "it eats"], ["a hen", "a bird"], ["a pig"]]
PICTURES = [picture(number) for number in range(5)]


def table(path: Path, rows: int = 2, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def as_sentences(said: list[list[str]]) -> list[list[dict[str, Any]]]:
    """In COCO's form, what is not learnt from first."""
    return [[{"tokens": text.split(), "raw": text, "sentid": 7} for text in texts] for texts in said]


FORMS: dict[str, dict[str, Any]] = {
    "lists": {"caption": SAID},
    "large lists": {"caption": pa.array(SAID, pa.large_list(pa.large_string()))},
    "sentences": {"sentences": as_sentences(SAID)},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_caption_of_a_list_is_a_record_with_the_rows_picture(form: str, tmp_path: Path) -> None:
    source = open_source(table(tmp_path / "x.parquet", image=PICTURES, **FORMS[form]))

    expected = [(row, text) for row, texts in enumerate(SAID) for text in texts]
    assert len(source) == len(expected) and source.known_bad() == []
    assert source.text_lengths is not None
    assert list(source.text_lengths) == [len(text) for _, text in expected]
    for number in (8, 0, 3, 1, 4, 2, 5, 7, 6):
        row, text = expected[number]
        record = source.read(number)
        assert (record.key, record.picture, record.turns) == (f"x.parquet:{row}", PICTURES[row], (("", text),))
    with pytest.raises(DataError, match="has no record 9, it has 9"):
        source.read(9)


def test_an_object_in_the_captions_place_has_its_words_read(tmp_path: Path) -> None:
    sentences = [texts[0] for texts in as_sentences(SAID)]

    source = open_source(table(tmp_path / "x.parquet", image=PICTURES, sentences=sentences))

    assert [source.read(number).turns[0][1] for number in range(5)] == [texts[0] for texts in SAID]
    assert source.text_lengths is None  # nothing was read


def test_lists_go_on_from_file_to_file(tmp_path: Path) -> None:
    table(tmp_path / "train-0.parquet", image=PICTURES[:3], caption=SAID[:3])
    table(tmp_path / "train-1.parquet", image=PICTURES[3:], caption=SAID[3:])

    source = open_source(tmp_path)

    assert [source.read(number).key for number in (5, 6, 8)] == [
        "train-0.parquet:2", "train-1.parquet:0", "train-1.parquet:1",
    ]  # fmt: skip
    assert [source.group(number) for number in (5, 6)] == ["train-0.parquet", "train-1.parquet"]


def test_a_bad_caption_is_counted_at_the_start_and_those_beside_it_are_read(tmp_path: Path) -> None:
    said = [["a cat", None, "it sits"], [], None, [" "], ["x" * 2**19, "a dog"]]

    source = open_source(table(tmp_path / "x.parquet", image=PICTURES, caption=said))

    assert source.known_bad() == [1, 3, 4, 5, 6] and len(source) == 8
    told = []
    for number in source.known_bad():
        with pytest.raises(BadRecordError) as error:
            source.read(number)
        told.append((error.value.kind, error.value.message.split(" has ")[0]))
    assert told == [
        ("no text", "x.parquet:0"), ("no text", "x.parquet:1"), ("no text", "x.parquet:2"), ("no text", "x.parquet:3"),
        ("text that is too long", "x.parquet:4: the caption"),
    ]  # fmt: skip
    assert [source.read(number).turns[0][1] for number in (0, 2, 7)] == ["a cat", "it sits", "a dog"]


def test_captions_of_a_row_are_read_side_by_side(tmp_path: Path) -> None:
    said = [["a cat", None, "it sits", "asleep"], ["a dog"], [], ["a hen"], ["a pig"]]
    source = open_source(table(tmp_path / "x.parquet", image=PICTURES, caption=said))

    joined = by_picture(source, 2)

    records = [joined.read(number) for number in (1, 2, 3)]
    assert [(record.turns, record.beside) for record in records] == [
        ((("", "a cat"),), ((("", "it sits"),),)),
        ((("", "asleep"),), ()),
        ((("", "a dog"),), ()),
    ]
    assert records[0].picture == records[1].picture == PICTURES[0]
    assert joined.text_lengths == [0, 12, 6, 5, 0, 5, 5]
    with pytest.raises(BadRecordError, match="has no caption"):
        joined.read(0)


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        ([texts[0] for texts in SAID], "has one text for each of its pictures"),
        ([texts[:1] for texts in SAID], "no picture of .* stands there twice"),
    ],
)
def test_nothing_to_read_side_by_side_is_told(captions: object, words: str, tmp_path: Path) -> None:
    source = open_source(table(tmp_path / "x.parquet", image=PICTURES, caption=captions))

    with pytest.raises(ConfigError, match=words):
        by_picture(source, 2)


def batches(path: Path, most: int) -> SourceBatches:
    source = open_source(path)
    sources = [by_picture(source, most) if most > 1 else source]
    order = Order((len(sources[0]),), (1.0,), seed=3, stage=0)
    return SourceBatches(
        sources, order, Layout(tiny_chat.processor()), ["What?"], length=6, batch_size=3, bucket_batches=2
    )


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
def test_any_number_of_workers_reads_the_same_and_so_does_a_run_that_goes_on(most: int, tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", image=PICTURES, caption=SAID)
    alone = batches(path, most)
    expected = [(batch["keys"], batch["input_ids"].tolist()) for batch in (alone[item] for item in range(6))]

    def read(batch: dict[str, Any]) -> tuple[list[str], list[list[int]]]:
        return batch["keys"], batch["input_ids"].tolist()

    for workers in (1, 2):
        loader = DataLoader(batches(path, most), batch_size=None, num_workers=workers, collate_fn=read)
        assert list(loader) == expected
    later = batches(path, most)
    assert [read(later[item]) for item in (4, 5)] == expected[4:]


def test_no_picture_is_read_to_count_captions_and_one_row_group_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    plain = pq.ParquetFile.iter_batches

    def iter_batches(file: object, rows: int, *, columns: list[str], **options: Any) -> Iterator[Any]:
        asked.append(columns)
        return plain(file, rows, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    path = table(tmp_path / "x.parquet", image=PICTURES, sentences=as_sentences(SAID))

    source = open_source(path)

    (columns,) = asked
    assert len(columns) == 1 and columns[0].startswith("sentences.") and columns[0].endswith(".raw")
    assert isinstance(source, parquet.ParquetSource)
    size = len(pickle.dumps(source))
    for number in range(len(source)):
        source.read(number)
        assert len(source._held) == 1
    assert len(pickle.dumps(source)) == size


def test_identity_follows_which_captions_belong_to_which_row(tmp_path: Path) -> None:
    found = []
    for said in (SAID, SAID, [["a cat"], ["it sits", "a dog"], *SAID[2:]]):
        found.append(open_source(table(tmp_path / "x.parquet", image=PICTURES, caption=said)).identity)

    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("captions", [SAID, [texts[0] for texts in SAID]], ids=["lists", "texts"])
def test_rows_for_testing_are_left_out_and_told(captions: object, tmp_path: Path) -> None:
    splits = ["train", "test", "restval", "val", "train"]
    path = table(tmp_path / "x.parquet", image=PICTURES, caption=captions, split=splits)

    source = open_source(path)

    assert source.skipped == {"row of another split": 2}
    assert {source.read(number).key for number in range(len(source))} == {f"x.parquet:{row}" for row in (0, 2, 4)}
    assert len(source) == (6 if captions is SAID else 3) and check_source(source).bad == 0
    if captions is SAID:
        assert source.text_lengths is not None
        assert list(source.text_lengths) == [len(text) for row in (0, 2, 4) for text in SAID[row]]


def test_a_table_for_testing_alone_is_read(tmp_path: Path) -> None:
    source = open_source(table(tmp_path / "x.parquet", image=PICTURES, caption=SAID, split=["test"] * 5))

    assert len(source) == 9 and source.skipped == {}


def test_whoever_waits_for_many_lists_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "x.parquet", image=PICTURES, caption=SAID)
    told: list[tuple[str, int, int]] = []

    def tell(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    open_source(path, report=tell)
    assert told == []

    monkeypatch.setattr(lists, "ROWS_PER_REPORT", 3)
    monkeypatch.setattr(parquet_rows, "ROWS_PER_REPORT", 3)
    monkeypatch.setattr(parquet_rows, "_ROWS_AT_ONCE", 2)
    open_source(path, report=tell)
    assert told == [("reading x.parquet", done, 5) for done in (2, 4, 5)]


def test_a_damaged_list_is_refused_at_the_start(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", image=PICTURES, caption=SAID)
    content = path.read_bytes()
    path.write_bytes(b"PAR1" + b"\xff" * (len(content) // 2) + content[4 + len(content) // 2 :])

    with pytest.raises(DataError, match=r"x\.parquet is not a parquet file, or it is damaged: ."):
        open_source(path)


@pytest.mark.parametrize("listed", [False, True])
def test_rows_that_img2dataset_could_not_fetch_are_passed_over_and_counted(listed: bool, tmp_path: Path) -> None:
    """`--output_format parquet` keeps them: some ten in a hundred, which would stop any run as bad records."""
    said = SAID if listed else [texts[0] for texts in SAID]
    status = ["success", "failed_to_download", "success", "failed_to_resize", "success"]
    found = [None if state != "success" else content for state, content in zip(status, PICTURES, strict=True)]
    errors = [None if state == "success" else "HTTP Error 404" for state in status]
    made = table(tmp_path / "00000.parquet", jpg=found, caption=said, status=status, error_message=errors)

    source = open_source(made)

    assert source.skipped == {"row whose picture was not fetched": 2}
    assert [source.read(n).picture for n in range(len(source))] == [
        PICTURES[row] for row in (0, 2, 4) for _ in range(len(SAID[row]) if listed else 1)
    ]
    assert check_source(source).bad == 0


def test_a_column_status_of_another_kind_means_nothing(tmp_path: Path) -> None:
    made = table(tmp_path / "x.parquet", image=PICTURES, caption=[texts[0] for texts in SAID], status=["draft"] * 5)
    assert len(open_source(made)) == 5


def test_a_table_of_which_nothing_was_fetched_is_refused(tmp_path: Path) -> None:
    jpg = pa.array([None], pa.binary())
    made = table(tmp_path / "x.parquet", jpg=jpg, caption=["a cat"], status=["failed"], error_message=["404"])
    with pytest.raises(DataError, match="no rows to learn from: 1 x row whose picture was not fetched"):
        open_source(made)
