"""LLaVA's conversations: several questions about a picture, or text alone."""

from pathlib import Path
from typing import Any

import pytest

from minigpt4.data.record import Record
from minigpt4.data.sources import open_source
from minigpt4.data.sources.safe_files import MAX_TEXT_BYTES, BadRecordError
from minigpt4.errors import DataError
from tests.data.sources.source_files import picture, write


def talk(*texts: str, **more: object) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": "000000033471", "image": "000000033471.jpg", "conversations": turns, **more}


def write_list(folder: Path, *items: object) -> Path:
    write(folder / "000000033471.jpg", picture(1))
    return write(folder / "llava.json", list(items))


def test_all_turns_are_read_without_the_picture_mark(tmp_path: Path) -> None:
    path = write_list(tmp_path, talk("What is it?\n<image>", "A bus.", "What colour?", "Red.\nAnd white."))

    assert open_source(path).read(0) == Record(
        "llava.json:1 (000000033471)", picture(1), (("What is it?", "A bus."), ("What colour?", "Red.\nAnd white."))
    )


@pytest.mark.parametrize(
    ("value", "question"),
    [
        ("<image>\nWhat is it?", "What is it?"),
        ("What\nis it?\n\n<image>", "What\nis it?"),
        ("<image>", ""),
        ("Is </s> or <s> text?", "Is </s> or <s> text?"),
    ],
)
def test_marks_and_the_breaks_round_them_are_removed(value: str, question: str, tmp_path: Path) -> None:
    assert open_source(write_list(tmp_path, talk(value, "Yes."))).read(0).turns == ((question, "Yes."),)


def test_text_alone_has_no_picture(tmp_path: Path) -> None:
    item = talk("Hello", "Hi")
    del item["image"]

    record = open_source(write_list(tmp_path, item)).read(0)

    assert record.picture is None and record.turns == (("Hello", "Hi"),)


def test_picture_may_bear_cocos_long_name(tmp_path: Path) -> None:
    path = write(tmp_path / "list" / "llava.json", [talk("<image>", "A bus.", image="train/000000033471.jpg")])
    write(tmp_path / "coco" / "train" / "COCO_train2014_000000033471.jpg", picture(1))

    assert open_source(path, images=tmp_path / "coco").read(0).picture == picture(1)


def test_lines_and_folders_are_read_too(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", picture())
    write(tmp_path / "x.jsonl", '{"image": "a.jpg", "conversations": [{"from": "user", "value": "q"},'
          ' {"from": "assistant", "value": "a"}]}\n')  # fmt: skip

    assert open_source(tmp_path).read(0) == Record("x.jsonl:1", picture(), (("q", "a"),))


def test_messages_of_other_trainers_are_read_too(tmp_path: Path) -> None:
    said = [("system", "Be brief."), ("user", "<image>What is it?"), ("assistant", "A bus.")]
    messages = [{"role": role, "content": text} for role, text in said]
    write(tmp_path / "a.jpg", picture())
    write(
        tmp_path / "messages.json",
        [{"messages": messages, "images": ["a.jpg"]}, {"conversation": messages[1:], "image": "a.jpg"}],
    )

    source = open_source(tmp_path / "messages.json")

    assert [source.read(number).turns for number in (0, 1)] == [(("What is it?", "A bus."),)] * 2
    assert source.read(0).picture == picture()
    assert source.skipped == {"system messages": 1}


@pytest.mark.parametrize("image", [None, "", []])
def test_text_alone_may_name_no_picture(image: object, tmp_path: Path) -> None:
    source = open_source(write_list(tmp_path, talk("q", "a", image=image)), format="conversations")

    assert source.read(0).picture is None and source.read(0).turns == (("q", "a"),)


BAD: dict[str, tuple[object, str]] = {
    "no object": (7, "has no list of conversations"),
    "no turns": ({"conversations": []}, "has no list of conversations"),
    "no answer": (talk("q", "a", "q"), "ends with a question, expected an answer"),
    "empty answer": (talk("q", " "), "has no answer"),
    "answer that is a number": (talk("q", 7), "the answer is a number, expected text"),  # type: ignore[arg-type]
    "system turn": ({"conversations": [{"from": "system"}, {}]}, "turn 1 is from 'system', expected human"),
    "two questions": (
        {"conversations": [{"from": "human", "value": "q"}] * 2}, "turn 2 is from 'human', expected gpt"
    ),
    "turn that is text": ({"conversations": ["q", "a"]}, "turn 1 is from 'None', expected human"),
    "two pictures": (talk("q", "a", image=["a.jpg", "b.jpg"]), "its image is not the name of one picture"),
    "mark without picture": (talk("<image>\nq", "a", image=None), "speaks of <image> and names none"),
    "outside": (talk("q", "a", image="../x.jpg"), "outside the folder of the pictures"),
    "gone": (talk("q", "a", image="gone.jpg"), r"the picture 'gone\.jpg' is not in"),
    "long": (talk(*["x" * (MAX_TEXT_BYTES // 2)] * 4), "its turns have 524,288 bytes, up to 256 KiB are read"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_record_is_told_and_the_next_is_read(fault: str, tmp_path: Path) -> None:
    item, words = BAD[fault]
    source = open_source(write_list(tmp_path, item, talk("q", "a")), format="conversations")

    with pytest.raises(BadRecordError, match=words) as told:
        source.read(0)

    assert told.value.message.startswith("llava.json:1")
    assert source.read(1).turns == (("q", "a"),)


def test_what_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a list"):
        open_source(write(tmp_path / "x.json", {"a": 1}), format="conversations")


PARTS: dict[str, tuple[list[dict[str, object]], dict[str, object]]] = {
    "OpenAI's": ([{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "a.jpg"}}], {}),
    "a name": ([{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}], {}),
    "a place": ([{"type": "image"}, {"type": "text", "text": "What?"}], {"images": ["a.jpg"]}),
}


@pytest.mark.parametrize("form", PARTS)
def test_messages_in_parts_are_read(form: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", picture())
    parts, more = PARTS[form]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]}

    source = open_source(write_list(tmp_path, {"messages": [{"role": "user", "content": parts}, answer], **more}))

    assert source.read(0) == Record("llava.json:1", picture(), (("What?", "A bus."),))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "speaks of <image> and names none"),
        ([{"type": "image", "image": name} for name in ("a.jpg", "b.jpg")], "is not the name of one picture"),
        ([{"type": "image_url", "image_url": {"url": "https://a.example/a.jpg"}}], "is an address"),
        ([{"type": "image", "image": 7}], "is not the name of one picture"),
        (["What?"], "the question is a list"),
    ],
)
def test_parts_that_name_no_picture_of_a_folder_are_bad(parts: object, words: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A bus."}]

    with pytest.raises(BadRecordError, match=words):
        open_source(write_list(tmp_path, {"messages": turns})).read(0)


def test_a_video_is_not_taken_for_text_alone(tmp_path: Path) -> None:
    item = {**talk("<video>What?", "A bus."), "video": "a.mp4"}
    del item["image"]

    with pytest.raises(BadRecordError, match="is about a video, and pictures are read"):
        open_source(write_list(tmp_path, item)).read(0)
