"""What nano knows: naming photographs, colours, counting, second questions; each beside the same without a picture.

    python benchmarks/nano_figures.py --photos DIR --imagenet DIR --sprites DIR --json figures.json

`--photos` is a folder of tar shards whose records have `label` (and `held_out`), `--imagenet` one picture for each of
the thousand classes, `nXXXXXXXX_name.JPEG` sorted in the order of the classes. Neither is needed by the package.
An answer counts as right when it holds the name, or the name's last word (for "golden retriever": "retriever").
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

from minigpt4.chat import ChatSession
from minigpt4.data.build.scenes import draw_scene
from minigpt4.data.build.sprites import Sprites
from minigpt4.data.shards import index_shards
from minigpt4.weights import load
from minigpt4.weights.nano import class_words

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
WHAT = "What is in this picture?"


@dataclass(frozen=True)
class Item:
    """A picture, the questions before the one that counts, that one, and how its answer is judged."""

    picture: Image.Image
    questions: tuple[str, ...]
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


def scenes(task: str, count: int, sprites: Sprites | None) -> Iterator[Item]:
    """Yield drawn scenes of one kind of thing, none of them seen in training."""
    rng = np.random.default_rng([99, len(task)])
    while count:
        picture, scene = draw_scene(rng, sprites if task == "count drawings to three" else None)
        things = scene.objects
        one_kind = len({(thing.kind, thing.colour) for thing in things}) == 1
        if not one_kind or len(things) > 3 or (task in ("colour", "shape", "second question") and len(things) > 1):
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
    chat = ChatSession(*load(arguments.model))
    results = {}
    for task, items in tasks.items():
        if not any(part in task for part in arguments.only):
            continue
        started = time.monotonic()
        results[task] = result = measure(chat, items)
        print(f"{task}: {result['right']} of {result['of']}, without the picture {result['blind']}", flush=True)
        print(f"  {time.monotonic() - started:.0f} s; {result['answers'][:6]}", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
