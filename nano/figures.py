"""What nano knows: naming photographs, colours, counting, second questions and pictures; each beside a blind figure.

    python -m nano.figures --photos DIR --imagenet DIR --sprites DIR --json figures.json

`--photos` is a folder of tar shards whose records have `label` (and `held_out`), `--imagenet` one picture for each of
the thousand classes, `nXXXXXXXX_name.JPEG` sorted in the order of the classes. Neither is needed by the package.
An answer counts as right when it holds the name, or the name's last word (for "golden retriever": "retriever").
Blind is the same question without a picture; in a conversation about two, without the second.
"""

import argparse
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minigpt4.inference.chat import ChatSession
from minigpt4.weights import load
from minigpt4.weights.nano import class_words
from nano.mixture import with_article
from nano.scenes.drawing import draw_scene
from nano.scenes.record import Scene
from nano.scenes.text import caption
from nano.shards import index_shards
from nano.sprites import Sprites

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
WHAT = "What is in this picture?"
WHAT_NEXT = (WHAT, "And what is this?", "What is in the second picture?")


@dataclass(frozen=True)
class Item:
    """A picture, the questions before the one that counts, that one, and how its answer is judged."""

    picture: Image.Image
    questions: tuple[str, ...]
    is_right: Callable[[str], bool]


@dataclass(frozen=True)
class SecondItem:
    """A conversation that goes on with a second picture.

    Args:
        first: The first picture, the question about it and the right answer, which stand in the conversation.
        picture: The second picture.
        question: The question about it.
        is_right: Judges the answer; the right one about the first picture would be wrong.
    """

    first: tuple[Image.Image, str, str]
    picture: Image.Image
    question: str
    is_right: Callable[[str], bool]


def names(name: str) -> Callable[[str], bool]:
    """Judge an answer by a name."""
    wanted = {name.lower(), name.lower().split()[-1]}

    def is_right(answer: str) -> bool:
        return any(re.search(rf"\b{re.escape(word)}(?:e?s)?\b", answer.lower()) for word in wanted)

    return is_right


def says(word: str) -> Callable[[str], bool]:
    """Judge an answer by a word."""
    return lambda answer: re.search(rf"\b{word}\b", answer.lower()) is not None


def imagenet(folder: Path, count: int) -> Iterator[Item]:
    """Yield photographs of classes, evenly spread over the thousand."""
    files = sorted(folder.glob("*.JPEG"))
    for number in np.linspace(0, len(files) - 1, count).astype(int):
        yield Item(Image.open(files[number]).convert("RGB"), (WHAT,), names(class_words()[number]))


def photos(folder: Path, held_out: bool, count: int) -> Iterator[Item]:
    """Yield photographs of classes that were trained, or never."""
    samples = [s for s in index_shards(folder) if bool(s.read_record().get("held_out")) == held_out]
    for number in np.random.default_rng(0).permutation(len(samples))[:count]:
        sample = samples[number]
        picture = Image.open(io.BytesIO(sample.read_picture())).convert("RGB")
        record = sample.read_record()
        yield Item(picture, (WHAT,), names(record.get("coarse") or record["label"]))


def second_photos(folder: Path, count: int) -> Iterator[SecondItem]:
    """Yield the photographs of `imagenet`, each after one of another class."""
    files = sorted(folder.glob("*.JPEG"))
    numbers = [int(number) for number in np.linspace(0, len(files) - 1, count)]
    for at, number in enumerate(numbers):
        is_right = names(class_words()[number])
        others = [*numbers[at + count // 3 :], *numbers]
        before = next(other for other in others if not is_right(class_words()[other]))
        answer = f"The picture shows {with_article(class_words()[before])}."
        first, second = (Image.open(files[n]).convert("RGB") for n in (before, number))
        yield SecondItem((first, WHAT, answer), second, WHAT_NEXT[at % 3], is_right)


def second_scenes(count: int) -> Iterator[SecondItem]:
    """Yield drawings of one kind of shape, each after another: what it is, which colour, how many, in turn."""
    drawn = drawings("second picture", None)
    for at in range(count):
        (first, old), (second, new) = next(drawn), next(drawn)
        question, word = _about(new, at)
        while _about(old, at)[1] == word:
            first, old = next(drawn)
        yield SecondItem((first, WHAT, f"The picture shows {caption(old)}."), second, question, names(word))


def _about(scene: Scene, at: int) -> tuple[str, str]:
    """Return a question about things of one kind, and the word that its answer has."""
    thing, one = scene.objects[0], len(scene.objects) == 1
    if at % 3 == 0:
        return WHAT_NEXT[at // 3 % 3], thing.kind
    if at % 3 == 1:
        return f"What color {'is it' if one else 'are they'}?", str(thing.colour)
    return f"How many {thing.plural} are there?", NUMBERS[len(scene.objects)]


def drawings(task: str, sprites: Sprites | None) -> Iterator[tuple[Image.Image, Scene]]:
    """Yield drawn scenes of one to three things of one kind and colour, none of them seen in training."""
    rng = np.random.default_rng([99, len(task)])
    while True:
        picture, scene = draw_scene(rng, sprites)
        if len({(thing.kind, thing.colour) for thing in scene.objects}) == 1 and len(scene.objects) <= 3:
            yield picture, scene


def scenes(task: str, count: int, sprites: Sprites | None) -> Iterator[Item]:
    """Yield questions about drawn scenes."""
    for picture, scene in drawings(task, sprites if task == "count drawings to three" else None):
        if not count:
            return
        things = scene.objects
        if task in ("colour", "shape", "second question") and len(things) > 1:
            continue
        count -= 1
        colour, kind = str(things[0].colour), things[0].kind
        if task == "colour":
            yield Item(picture, (f"What color is the {kind}?",), says(colour))
        elif task == "shape":
            yield Item(picture, ("What shape is it?",), says(kind))
        elif task == "second question":
            yield Item(picture, (WHAT, "What color is it?"), says(colour))
        else:
            yield Item(picture, (f"How many {things[0].plural} are there?",), says(NUMBERS[len(things)]))


def ask(chat: ChatSession, questions: tuple[str, ...], picture: Image.Image | None) -> str:
    """Return the answer that counts."""
    chat.reset()
    if picture is not None:
        chat.add_image(picture)
    for question in questions:
        answer = chat.ask(question, max_new_tokens=40)
    return answer


def measure(chat: ChatSession, items: Iterator[Item]) -> dict[str, Any]:
    """Ask about every item, with the picture and without."""
    answers, blind_answers, right, blind = [], {}, 0, 0
    for item in items:
        answers.append(ask(chat, item.questions, item.picture))
        if item.questions not in blind_answers:  # without a picture the answer is always the same
            blind_answers[item.questions] = ask(chat, item.questions, None)
        right += item.is_right(answers[-1])
        blind += item.is_right(blind_answers[item.questions])
    return {"right": right, "blind": blind, "of": len(answers), "answers": answers}


def continued(chat: ChatSession, item: SecondItem, picture: Image.Image | None) -> str:
    """Return the answer about a second picture; the first turn is given, not generated."""
    first, question, answer = item.first
    second = [{"type": "image", "image": picture}] if picture is not None else []
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {"role": "user", "content": [*second, {"type": "text", "text": item.question}]},
    ]
    inputs = chat.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    output = chat.model.generate(**inputs, max_new_tokens=40, do_sample=False)
    text: str = chat.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def measure_second(chat: ChatSession, items: Iterator[SecondItem]) -> dict[str, Any]:
    """Ask about every second picture, with it and without."""
    answers, blind_answers = [], []
    right = blind = 0
    for item in items:
        answers.append(continued(chat, item, item.picture))
        blind_answers.append(continued(chat, item, None))
        right += item.is_right(answers[-1])
        blind += item.is_right(blind_answers[-1])
    return {"right": right, "blind": blind, "of": len(answers), "answers": answers, "blind_answers": blind_answers}


def main() -> None:
    """Measure, print a table, write every answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="nano")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--imagenet", type=Path)
    parser.add_argument("--sprites", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[""], help="tasks whose names hold one of these")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    n = arguments.count
    tasks: dict[str, Iterator[Item]] = {}
    if arguments.imagenet:
        tasks["photos of classes no photo was trained of"] = imagenet(arguments.imagenet, n)
    if arguments.photos:
        tasks["photos of trained classes"] = photos(arguments.photos, False, n)
        tasks["photos of classes held out here"] = photos(arguments.photos, True, n)
    tasks |= {task: scenes(task, n, None) for task in ("colour", "shape", "count to three", "second question")}
    if arguments.sprites:
        sprites = Sprites(arguments.sprites, held_out=False)
        tasks["count drawings to three"] = scenes("count drawings to three", n, sprites)
    second: dict[str, Iterator[SecondItem]] = {"second picture, drawings": second_scenes(n)}
    if arguments.imagenet:
        second["second picture, photos of classes no photo was trained of"] = second_photos(arguments.imagenet, n)
    chat = ChatSession(*load(arguments.model))
    results = {}
    for task in [*tasks, *second]:
        if not any(part in task for part in arguments.only):
            continue
        started = time.monotonic()
        result = measure(chat, tasks[task]) if task in tasks else measure_second(chat, second[task])
        results[task] = result
        print(f"{task}: {result['right']} of {result['of']}, without the picture {result['blind']}", flush=True)
        print(f"  {time.monotonic() - started:.0f} s; {result['answers'][:6]}", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
