"""Questions and answers in the forms of VQAv2, OK-VQA, A-OKVQA, GQA and plain lists."""

from pathlib import Path
from typing import Any

import pytest

from minigpt4.data.sources import open_source
from minigpt4.data.sources.questions import most_frequent
from minigpt4.data.sources.safe_files import BadRecordError
from minigpt4.errors import DataError
from tests.data.sources.source_files import picture, write

QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 9, "question": "What colour?", "question_id": 90},
        {"image_id": 9, "question": "How many?", "question_id": 91},
        {"image_id": 25, "question": "Where?", "question_id": 92},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 91, "image_id": 9, "multiple_choice_answer": "two", "answers": []},
        {"question_id": 90, "image_id": 9, "answers": [{"answer": a} for a in ("blue", "red", "red", "", None)]},
    ]
}
NAMES = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    write(tmp_path / NAMES[0], QUESTIONS)
    write(tmp_path / NAMES[1], ANNOTATIONS)
    write(tmp_path / "train2014" / "COCO_train2014_000000000009.jpg", picture(9))
    return tmp_path


@pytest.mark.parametrize("named", ["", NAMES[0]])
def test_questions_and_annotations_are_joined(named: str, vqa: Path) -> None:
    write(vqa / "v2_mscoco_val2014_annotations.json", {"annotations": []})

    source = open_source(vqa / named, images=vqa / "train2014")

    assert [source.read(number).turns for number in (0, 1)] == [(("What colour?", "red"),), (("How many?", "two"),)]
    assert source.read(0).picture == picture(9)
    with pytest.raises(BadRecordError, match=r"questions\.json:3 has no answer"):
        source.read(2)


def test_missing_annotations_are_told(vqa: Path) -> None:
    (vqa / NAMES[1]).unlink()

    with pytest.raises(DataError, match=f"the annotations of .* are missing, expected {NAMES[1]} beside it"):
        open_source(vqa)


def test_two_lists_of_questions_are_refused(vqa: Path) -> None:
    write(vqa / "other_questions.json", QUESTIONS)

    with pytest.raises(DataError, match=r"has 2 files \*question\*\.json, expected one"):
        open_source(vqa)


def test_most_frequent_answer_is_learnt_and_the_first_of_equals() -> None:
    assert most_frequent(["a", "b", "b"]) == "b"
    assert most_frequent(["b", "a", "a", "b"]) == "b"


LISTS: dict[str, tuple[Any, str, str]] = {
    "plain": ([{"image": "x.jpg", "question": "q", "answer": "a"}], "x.jpg", "a"),
    "several answers": ([{"image": "x.jpg", "question": "q", "answers": ["b", "a", "a"]}], "x.jpg", "a"),
    "a-okvqa": (
        [{"image_id": 7, "question": "q", "direct_answers": ["a", "a"], "choices": ["x"], "correct_choice_idx": 0}],
        "000000000007.jpg", "a",
    ),
    "choices": ([{"image_id": 7, "question": "q", "choices": ["x", "a"], "correct_choice_idx": 1}],
                "COCO_train2014_000000000007.jpg", "a"),
    "gqa": ({"0201": {"imageId": "2375429", "question": "q", "answer": "a", "fullAnswer": "long"}}, "2375429.jpg", "a"),
    "textvqa": ({"data": [{"image_id": "0054c91", "question": "q", "answers": ["a"]}]}, "0054c91.jpg", "a"),
}  # fmt: skip


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_every_form_are_read(form: str, tmp_path: Path) -> None:
    content, name, answer = LISTS[form]
    write(tmp_path / name, picture(3))
    path = write(tmp_path / "list.json", content)

    record = open_source(path, format="vqa" if form == "textvqa" else "auto").read(0)

    assert (record.picture, record.turns) == (picture(3), (("q", answer),))


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (7, "is not an object with a question and an answer"),
        ({"question": "q", "answer": "a"}, "names no picture"),
        ({"image": True, "question": "q", "answer": "a"}, "names no picture"),
        ({"image_id": -1, "question": "q", "answer": "a"}, "names no picture"),
        ({"image": "x.jpg", "answer": "a"}, "has no question"),
        ({"image": "x.jpg", "question": "q"}, "has no answer"),
        ({"image": "x.jpg", "question": "q", "answers": [None, ""]}, "has no answer"),
        ({"image": "x.jpg", "question": "q", "answer": {"a": 1}}, "the answer is an object, expected text"),
        ({"image": "x.jpg", "question": "q", "choices": ["a"], "correct_choice_idx": 1}, "has no answer"),
        ({"image": "../x.jpg", "question": "q", "answer": "a"}, "outside the folder"),
        ({"image": "../x", "question": "q", "answer": "a"}, "outside the folder"),
    ],
)
def test_bad_question_is_told(item: object, words: str, tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "list.json", [item]), format="vqa")

    with pytest.raises(BadRecordError, match=words) as told:
        source.read(0)

    assert told.value.message.startswith("list.json:1")
