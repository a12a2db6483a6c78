"""What can truly be said about a scene in one piece: its caption, and a dialogue about it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from nano.scenes.colours import COLOURS
from nano.scenes.phrases import by_kind, counted, phrase_groups, pick, spelling, there_are
from nano.scenes.questions import Item, questions
from nano.scenes.record import Scene
from nano.scenes.words import NUMBERS, article, listing

_PRONOUN_SHARE = 0.8
_OPEN_SHARE = 0.7
_REPEATABLE = ("exists", "count", "colour")
_OPENER_SHARE = 0.5
_OPENERS = ("name", "describe", "count_total")
_WEIGHTS = {"name": 2.0, "describe": 2.0, "count": 3.0, "colour": 3.0, "count_total": 1.5, "exists": 1.5, "kinds": 0.5,
            "colours": 0.5, "identify": 0.3, "compare": 0.2, "size": 0.2, "position": 0.2}  # fmt: skip
"""How often a task is asked; 1 where none is named. What a small model cannot learn is asked rarely."""


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Write a short caption, lower case, largest group first and then in reading order.

    A plain background is named when everything in the picture is of one sort.

    Args:
        scene: What to caption.
        rng: Varies the wording when given; the canonical caption otherwise.
    """
    groups = phrase_groups(scene)
    plain = scene.background in COLOURS
    named = plain and (len(groups) == 1 if rng is None else rng.random() < 0.5)
    text = listing([counted(group) for group in groups])
    if named:
        text = f"{text} on {article(scene.background)} background"
    if rng is None:
        return text
    openings = ("", "", "", "there {be} ", "a picture of ", "a drawing of ", "an image of ", "the picture shows ")
    opening = openings[int(rng.integers(len(openings)))]
    return opening.format(be="is" if len(groups[0]) == 1 else "are") + text


def dialogue(scene: Scene, rng: np.random.Generator, turns: int) -> list[tuple[str, str]]:
    """Hold a conversation about a scene in which no question and no answer comes twice.

    Args:
        scene: What to talk about.
        rng: Chooses the course.
        turns: Wanted number of questions; fewer are returned when the scene has not so much to say.

    Returns:
        Questions with their answers.
    """
    pool = _by_weight(questions(scene, rng), rng)
    openers = [item for item in pool if item[0] in _OPENERS] if rng.random() < _OPENER_SHARE else pool
    first = openers[0]
    follow_ups = _shuffled(_pronouns(scene, rng), rng)[:2] if rng.random() < _PRONOUN_SHARE else []
    asked = {task for task, _, _ in follow_ups}
    chosen = [first]
    for item in follow_ups + [item for item in pool if item[0] not in asked | {"name", "describe"}]:
        if len(chosen) < turns and _is_new(item, chosen):
            chosen.append(item)
    return [(question, answer) for _, question, answer in chosen[:turns]]


def _by_weight(items: list[Item], rng: np.random.Generator) -> list[Item]:
    """Shuffle, tasks of a larger weight towards the front; a task with many items weighs no more than with one."""
    sizes = Counter(task for task, _, _ in items)
    keys = [rng.random() ** (sizes[task] / _WEIGHTS.get(task, 1.0)) for task, _, _ in items]
    return [item for _, item in sorted(zip(keys, items, strict=True), key=lambda pair: -pair[0])]


def _shuffled(items: list[Item], rng: np.random.Generator) -> list[Item]:
    return [items[int(index)] for index in rng.permutation(len(items))]


def _is_new(item: Item, chosen: Sequence[Item]) -> bool:
    """Whether neither question nor answer was heard before, and the task not too often."""
    task, question, answer = item
    heard = any(question == old_question or answer == old_answer for _, old_question, old_answer in chosen)
    return not heard and (task in _REPEATABLE or all(task != old_task for old_task, _, _ in chosen))


def _pronouns(scene: Scene, rng: np.random.Generator) -> list[Item]:
    """Follow-ups that lean on what was just named: possible when all things are of one kind."""
    if len(by_kind(scene)) != 1:
        return []
    things = list(scene.objects)
    one = len(things) == 1
    it, them, be = ("it", "it", "is") if one else ("they", "them", "are")
    color = spelling(rng)
    items = _pronoun_colour(scene, it, be, color, rng)
    wordings = ("How many are there?", "How many of them are there?", "How many do you see?", "How many are they?")
    answer = there_are(len(things), things[0].kind, things[0].plural)
    items.append(("count", pick(rng, wordings), answer))
    if scene.background in COLOURS:
        wordings = (
            f"What {color} is the background?",
            f"What is behind {them}?",
            f"And what {color} is the background?",
            f"What {color} is the background behind {them}?",
        )
        items.append(("background", pick(rng, wordings), f"The background is {scene.background}."))
    return items


def _pronoun_colour(scene: Scene, it: str, be: str, color: str, rng: np.random.Generator) -> list[Item]:
    colours = Counter(thing.colour for thing in scene.objects)
    if None in colours:
        return []
    word = pick(rng, sorted(str(colour) for colour in colours))
    if len(colours) > 1:
        number = NUMBERS[colours[word]].capitalize()
        verb = "is" if colours[word] == 1 else "are"
        question = pick(rng, (f"How many of them are {word}?", f"And how many are {word}?", f"How many are {word}?"))
        return [("count", question, f"{number} of them {verb} {word}.")]
    wordings = (f"What {color} {be} {it}?", f"Which {color} {be} {it}?", f"And what {color} {be} {it}?")
    asked, verdict = (word, "Yes") if rng.random() < 0.5 else (pick(rng, [c for c in COLOURS if c != word]), "No")
    if rng.random() < _OPEN_SHARE:
        return [("colour", pick(rng, wordings), f"{it.capitalize()} {be} {word}.")]
    return [("is_colour", f"{be.capitalize()} {it} {asked}?", f"{verdict}, {it} {be} {word}.")]
