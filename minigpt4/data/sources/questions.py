"""Questions about pictures with their answers: VQAv2, OK-VQA, A-OKVQA, GQA, and plain lists.

Which of several answers is learnt: the most frequent, and of those that are as frequent the first. (The original draws
one by its frequency each time; here a record is the same whenever it is read.)

Forms: a folder with `*questions*.json` and `*annotations*.json`, or the first of both (VQAv2, OK-VQA); a list of
objects with `question` and `answer`, `answers` or `direct_answers` (A-OKVQA, plain); an object of such objects (GQA).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minigpt4.data.sources.conversations import coco_names
from minigpt4.data.sources.formats import Place, Request
from minigpt4.data.sources.lists import ListSource, Rows, items_of, list_source, numbered, read_json
from minigpt4.data.sources.safe_files import (
    NO_PICTURE,
    NO_TEXT,
    PICTURE_SUFFIXES,
    WRONG_TEXT,
    BadRecordError,
    checked_text,
)
from minigpt4.data.sources.tables import table_in
from minigpt4.errors import DataError

_IMAGE_KEYS = ("image", "image_id", "imageId", "img", "file_name")
_ANSWER_KEYS = ("answers", "direct_answers", "answer", "label")


def sniff(place: Place) -> Path | None:
    """Return a folder with a list of questions and no table of captions, or the one list, if it has questions."""
    if place.path.is_dir() and not place.deep:
        there = any("question" in name.lower() and name.endswith(".json") for name in place.files)
        return place.path if there and table_in(place.path) is None else None
    has = "question" in place.keys or (isinstance(place.content, dict) and "questions" in place.content)
    return place.only_list if has else None


def open_source(request: Request) -> ListSource:
    """Open a list of questions with answers, or a folder with one of questions and one of annotations."""
    request.refuse("text", "questions and answers and no captions")
    file = _list_in(request.path) if request.path.is_dir() else request.path
    return list_source(request, file, file.parent, Rows(request.count).add_all(_items(file), _add))


def _list_in(folder: Path) -> Path:
    found = sorted(path for path in folder.glob("*.json") if "question" in path.name.lower())
    if len(found) != 1:
        raise DataError(
            f"{folder} has {len(found)} files *question*.json, expected one", "name the list of questions itself"
        )
    return found[0]


def _add(rows: Rows, key: str, item: Any) -> None:  # noqa: ANN401  (whatever a list holds)
    if not isinstance(item, Mapping):
        raise BadRecordError(WRONG_TEXT, f"{key} is not an object with a question and an answer")
    pictures = _pictures(item, key)
    rows.add(key, pictures, [(checked_text(item.get("question"), key, "question"), _answer(item, key))])


def most_frequent(answers: list[str]) -> str:
    """Return the answer given most often, the first of those given as often."""
    return Counter(answers).most_common(1)[0][0]


def _items(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix.lower() != ".json":
        return items_of(file)
    content = read_json(file)
    if isinstance(content, list):
        return numbered(file, content)
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        return _joined(file, content)
    if isinstance(content, dict) and isinstance(content.get("data"), list):  # TextVQA
        return numbered(file, content["data"])
    if not isinstance(content, dict) or "annotations" in content:
        raise DataError(f"{file} holds no questions", "name the list of questions; that of the annotations lies beside")
    return ((f"{file.name}:{name[:80]}", item) for name, item in content.items())


def _joined(file: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Put the answers of the annotations to the questions."""
    partner = _partner(file)
    annotations = read_json(partner)
    listed = annotations.get("annotations") if isinstance(annotations, dict) else None
    if not isinstance(listed, list):
        raise DataError(f"{partner} has no list of annotations", "fetch it again")
    answers = {str(item.get("question_id")): item for item in listed if isinstance(item, dict)}
    split = content.get("data_subtype")
    for key, item in numbered(file, content["questions"]):
        if isinstance(item, dict):
            found = answers.get(str(item.get("question_id")), {})
            kept = {name: found[name] for name in ("answers", "multiple_choice_answer") if name in found}
            item = {**item, **kept, "data_subtype": split}
        yield key, item


def _partner(questions: Path) -> Path:
    """Return the annotations that belong to a list of questions, by their names."""
    expected = questions.name.replace("questions", "annotations")
    for word in ("OpenEnded_", "MultipleChoice_"):
        expected = expected.replace(word, "")
    others = sorted(path for path in questions.parent.glob("*.json") if "annotation" in path.name.lower())
    if questions.with_name(expected) in others:
        return questions.with_name(expected)
    if len(others) == 1:
        return others[0]
    raise DataError(f"the annotations of {questions} are missing, expected {expected} beside it", "fetch them")


def _pictures(item: Mapping[str, Any], key: str) -> list[str]:
    """Return where an item's picture may lie: under a name, or under a number in COCO's way."""
    value = next((item[name] for name in _IMAGE_KEYS if item.get(name) is not None), None)
    if isinstance(value, str) and value.lower().endswith(PICTURE_SUFFIXES):
        return coco_names(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12:
        number = f"{value:012d}.jpg"
        split = item.get("data_subtype")
        return [
            *([f"COCO_{split}_{number}"] if isinstance(split, str) and split.isalnum() else []),
            *coco_names(number),
        ]
    if isinstance(value, str) and value.strip():
        return [f"{value}{suffix}" for suffix in PICTURE_SUFFIXES]
    raise BadRecordError(NO_PICTURE, f"{key} names no picture")


def _answer(item: Mapping[str, Any], key: str) -> str:
    """Return the answer to learn; see the head of this file."""
    value = next((item[name] for name in _ANSWER_KEYS if item.get(name) not in (None, [])), None)
    if value is None:
        value = item.get("multiple_choice_answer")
    if value is None and isinstance(item.get("choices"), list):  # A-OKVQA without direct answers
        number, choices = item.get("correct_choice_idx"), item["choices"]
        value = choices[number] if isinstance(number, int) and 0 <= number < len(choices) else None
    if not isinstance(value, list):
        return checked_text(value, key, "answer")
    said = [answer.get("answer") if isinstance(answer, dict) else answer for answer in value]
    texts = [answer for answer in said if isinstance(answer, str) and answer.strip()]
    if not texts:
        raise BadRecordError(NO_TEXT, f"{key} has no answer")
    return checked_text(most_frequent(texts), key, "answer")
