"""Records about the same picture become one, and none of them is lost."""

from pathlib import Path

import pytest

from minigpt4.data.record import Source
from minigpt4.data.sources import open_source
from minigpt4.data.sources.by_picture import by_picture
from minigpt4.data.sources.safe_files import BadRecordError
from minigpt4.errors import ConfigError
from tests.data.sources.source_files import picture, samples, shard, write

ASKED = [
    {"image": "a.jpg", "question": "What?", "answer": "a cat"},
    {"image": "b.jpg", "question": "Where?", "answer": "here"},
    {"image": "a.jpg", "question": "How many?", "answer": "one"},
    {"image": "b.jpg", "question": "", "answer": "nothing was asked"},
    {"image": "a.jpg", "question": "Why?", "answer": "who knows"},
]


@pytest.fixture
def questions(tmp_path: Path) -> Source:
    write(tmp_path / "questions.json", ASKED)
    for number, name in enumerate("ab"):
        write(tmp_path / f"{name}.jpg", picture(number))
    return open_source(tmp_path / "questions.json")


def test_records_of_a_picture_become_one_in_the_lists_order(questions: Source) -> None:
    joined = by_picture(questions, 8)

    record = joined.read(0)
    assert record.picture == picture(0)
    assert record.turns == (("What?", "a cat"),)
    assert record.beside == ((("How many?", "one"),), (("Why?", "who knows"),))
    assert record.key == "questions.json:1 and 2 more"
    assert joined.read(1).beside == ()


def test_more_than_are_wanted_become_another(questions: Source) -> None:
    joined = by_picture(questions, 2)

    assert len(joined) == 4
    assert [len(joined.read(number).beside) for number in (0, 1)] == [1, 0]
    assert joined.read(1).turns == (("Why?", "who knows"),)
    assert joined.read(1).picture == picture(0)


def test_a_bad_record_stays_by_itself(questions: Source) -> None:
    joined = by_picture(questions, 8)

    assert len(joined) == 3
    with pytest.raises(BadRecordError, match="question"):
        joined.read(2)


def test_a_missing_picture_is_told_for_all_of_its_texts(questions: Source, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").unlink()

    with pytest.raises(BadRecordError, match=r"a\.jpg"):
        by_picture(questions, 8).read(0)


def test_texts_without_a_picture_stay_apart(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello."}]
    both = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]
    write(tmp_path / "a.jpg", picture(0))
    write(
        tmp_path / "talks.json",
        [{"conversations": said}, {"image": "a.jpg", "conversations": both}] * 2,
    )

    joined = by_picture(open_source(tmp_path / "talks.json"), 4)

    assert [(joined.read(n).picture is None, len(joined.read(n).beside)) for n in range(3)] == [
        (True, 0), (False, 1), (True, 0),
    ]  # fmt: skip


def test_the_length_is_that_of_all_texts(questions: Source) -> None:
    joined = by_picture(questions, 2)

    lengths = questions.text_lengths
    assert lengths is not None
    assert joined.text_lengths == [lengths[0] + lengths[2], lengths[4], lengths[1], lengths[3]]


def test_another_number_of_texts_is_another_source(questions: Source) -> None:
    identities = {questions.identity, *(by_picture(questions, most).identity for most in (2, 3))}

    assert len(identities) == 3
    assert by_picture(questions, 2).identity in identities


def test_captions_of_a_picture_are_joined_too(tmp_path: Path) -> None:
    write(tmp_path / "captions.csv", b"file_name,caption\na.jpg,a cat\na.jpg,an animal\n")
    write(tmp_path / "a.jpg", picture(0))

    joined = by_picture(open_source(tmp_path), 8)

    assert (joined.read(0).turns, joined.read(0).beside) == ((("", "a cat"),), ((("", "an animal"),),))


def test_shards_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", samples(3))

    with pytest.raises(ConfigError, match="one text for each of its pictures"):
        by_picture(open_source(tmp_path), 2)


def test_a_list_that_names_each_picture_once_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "questions.json", ASKED[:2])

    with pytest.raises(ConfigError, match="stands there twice"):
        by_picture(open_source(tmp_path / "questions.json"), 2)
