"""The phrases that sentences about a scene are put together from: groups, names, numbers and filled-in wordings."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from nano.scenes.record import SHAPE, Scene, SceneObject
from nano.scenes.words import NUMBERS, WORDINGS, article, listing

_CLEAR_GAP = 0.15
_CATEGORY_NOUNS = {SHAPE: ("shape", "shapes"), "animal": ("animal", "animals"), "fruit": ("fruit", "fruits")}


def phrase_groups(scene: Scene) -> list[list[SceneObject]]:
    """Things that one phrase can name, largest group first, then in reading order."""
    groups: dict[tuple[str, str | None], list[SceneObject]] = {}
    for thing in scene.objects:
        groups.setdefault((thing.kind, thing.colour if thing.category == SHAPE else None), []).append(thing)
    return sorted(groups.values(), key=len, reverse=True)


def noun_of(thing: SceneObject, count: int) -> str:
    """The noun for `count` things like this one, with its colour when it is a shape."""
    noun = thing.kind if count == 1 else thing.plural
    return f"{thing.colour} {noun}" if thing.category == SHAPE and thing.colour else noun


def counted(group: list[SceneObject]) -> str:
    """A group as it is listed: "a red circle", "two dogs"."""
    noun = noun_of(group[0], len(group))
    return article(noun) if len(group) == 1 else f"{NUMBERS[len(group)]} {noun}"


def there(groups: list[list[SceneObject]]) -> str:
    """The sentence that says what is in the picture."""
    return f"There {'is' if len(groups[0]) == 1 else 'are'} {listing([counted(group) for group in groups])}."


def there_are(count: int, singular: str, plural: str) -> str:
    """The sentence that answers "how many"."""
    if count == 0:
        return f"There are no {plural}."
    return f"There is one {singular}." if count == 1 else f"There are {NUMBERS[count]} {plural}."


def by_kind(scene: Scene) -> dict[str, list[SceneObject]]:
    """The things of each kind, kinds in reading order."""
    kinds: dict[str, list[SceneObject]] = {}
    for thing in scene.objects:
        kinds.setdefault(thing.kind, []).append(thing)
    return kinds


def colour_of(things: Sequence[SceneObject]) -> str | None:
    """The one colour of all these things, or None."""
    colours = {thing.colour for thing in things}
    return colours.pop() if len(colours) == 1 else None


def general_noun(scene: Scene) -> tuple[str, str]:
    """What all the things in the scene are: shapes, animals, fruits or objects."""
    categories = {thing.category for thing in scene.objects}
    return (
        _CATEGORY_NOUNS.get(categories.pop(), ("object", "objects")) if len(categories) == 1 else ("object", "objects")
    )


def single_names(scene: Scene) -> dict[str, SceneObject]:
    """Phrases that mean exactly one thing of the scene."""
    phrases = Counter(thing.kind for thing in scene.objects)
    full = Counter((thing.kind, thing.colour) for thing in scene.objects)
    names = {}
    for thing in scene.objects:
        if phrases[thing.kind] == 1:
            names[thing.kind] = thing
        elif full[thing.kind, thing.colour] == 1 and thing.category == SHAPE and thing.colour:
            names[f"{thing.colour} {thing.kind}"] = thing
    return names


def verb_forms(things: Sequence[SceneObject]) -> dict[str, str]:
    """What the placeholders of a wording become for one thing or several."""
    one = len(things) == 1
    return {"is": "is" if one else "are", "does": "does" if one else "do"}


def clearly_before(first: SceneObject, second: SceneObject, axis: int, size: int) -> bool:
    """Whether the first thing is clearly left of (axis 0) or above (axis 1) the second, and not also on a slant."""
    along = second.centre[axis] - first.centre[axis]
    apart = second.box[axis] - first.box[axis + 2]
    across = abs(second.centre[1 - axis] - first.centre[1 - axis])
    return apart >= 0 and along > _CLEAR_GAP * size and along > 1.3 * across


def ask(task: str, rng: np.random.Generator, **parts: str) -> str:
    """One of the wordings of a task, filled in."""
    return fill(pick(rng, WORDINGS[task]), spelling(rng), **parts)


def spelling(rng: np.random.Generator) -> str:
    """British or American."""
    return "colour" if rng.random() < 0.5 else "color"


def fill(wording: str, color: str, **parts: str) -> str:
    """Fill in a wording; a placeholder with a capital takes its text with one, and "gray" follows the spelling."""
    capitals = {key.capitalize(): value[:1].upper() + value[1:] for key, value in parts.items()}
    text = wording.format(color=color, **parts, **capitals)
    return text.replace("gray", "grey").replace("Gray", "Grey") if color == "colour" else text


def pair(task: str, rng: np.random.Generator, yes: dict[str, str], no: dict[str, str]) -> tuple[str, str]:
    """The same wording twice, once to be affirmed and once to be denied."""
    wording, color = pick(rng, WORDINGS[task]), spelling(rng)
    return fill(wording, color, **yes), fill(wording, color, **no)


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of these, all equally likely."""
    return options[int(rng.integers(len(options)))]
