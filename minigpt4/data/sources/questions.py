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
from minigpt4.data.sources.faults import NO_PICTURE, NO_TEXT, WRONG_TEXT, BadRecordError, checked_text
from minigpt4.data.sources.guarded_folder import PICTURE_SUFFIXES, GuardedFolder
from minigpt4.data.sources.listed import Count, ListSource, Rows, items_of, list_source, read_json
from minigpt4.errors import DataError

_IMAGE_KEYS = ("image", "image_id", "imageId", "img", "file_name")
_ANSWER_KEYS = ("answers", "direct_answers", "answer", "label")


def open_questions(
    path: Path, *, images: Path | None = None, within: Path | None = None, count: Count | None = None
) -> ListSource:
    """Open questions with answers.

    Args:
        path: A folder with a list of questions and one of annotations, or a list.
        images: Where the pictures lie; left out: beside the list.
        within: Links may lead anywhere in this folder.
        count: Told of the rows read.

    Raises:
        DataError: A list is missing or of another form.
    """
    file = find_questions(path) if path.is_dir() else path
    rows = Rows(count=count)
    for key, item in _items(file):
        try:
            if isinstance(item, BadRecordError):
                raise item
            if not isinstance(item, Mapping):
                raise BadRecordError(WRONG_TEXT, f"{key} is not an object with a question and an answer")
            pictures = _pictures(item, key)
            turn = checked_text(item.get("question"), key, "question"), _answer(item, key)
            rows.add(key, pictures, [turn])
        except BadRecordError as error:
            rows.add_bad(error)
    return list_source(str(path), file, GuardedFolder(images or file.parent, within), rows)


def find_questions(folder: Path) -> Path:
    """Return the one list of questions in a folder.

    Raises:
        DataError: There is none, or more than one.
    """
    found = sorted(path for path in folder.glob("*.json") if "question" in path.name.lower())
    if len(found) != 1:
        raise DataError(
            f"{folder} has {len(found)} files *question*.json, expected one", "name the list of questions itself"
        )
    return found[0]


def most_frequent(answers: list[str]) -> str:
    """Return the answer given most often, the first of those given as often."""
    return Counter(answers).most_common(1)[0][0]


def _items(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix.lower() == ".jsonl":
        yield from items_of(file)
        return
    content = read_json(file)
    if isinstance(content, list):
        yield from ((f"{file.name}:{number}", item) for number, item in enumerate(content, 1))
    elif isinstance(content, dict) and isinstance(content.get("questions"), list):
        yield from _joined(file, content)
    elif isinstance(content, dict) and isinstance(content.get("data"), list):  # TextVQA
        yield from ((f"{file.name}:{number}", item) for number, item in enumerate(content["data"], 1))
    elif isinstance(content, dict) and "annotations" not in content:
        yield from ((f"{file.name}:{name[:80]}", item) for name, item in content.items())
    else:
        raise DataError(f"{file} holds no questions", "name the list of questions; that of the annotations lies beside")


def _joined(file: Path, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Put the answers of the annotations to the questions."""
    partner = _partner(file)
    annotations = read_json(partner)
    listed = annotations.get("annotations") if isinstance(annotations, dict) else None
    if not isinstance(listed, list):
        raise DataError(f"{partner} has no list of annotations", "fetch it again")
    answers = {item.get("question_id"): item for item in listed if isinstance(item, dict)}
    split = content.get("data_subtype")
    for number, item in enumerate(content["questions"], 1):
        key = f"{file.name}:{number}"
        if isinstance(item, dict):
            found = answers.get(item.get("question_id"), {})
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
