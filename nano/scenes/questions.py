"""Questions about a scene, each with the one whole-sentence answer that its record gives."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from nano.scenes.colours import COLOURS
from nano.scenes.phrases import (
    ask,
    by_kind,
    clearly_before,
    colour_of,
    counted,
    general_noun,
    noun_of,
    pair,
    phrase_groups,
    pick,
    single_names,
    there,
    there_are,
    verb_forms,
)
from nano.scenes.plan import confusable
from nano.scenes.record import SHAPE, Scene, SceneObject
from nano.scenes.shapes import SHAPES
from nano.scenes.words import NUMBERS, article, listing

Item = tuple[str, str, str]
_BIGGER = 1.7
_NONE_SHARE = 0.3
_CLEAR_CATEGORIES = {SHAPE, "animal", "fruit", "vegetable", "vehicle"}
_COUNT_NOUNS = ("objects", "things", "items")
_SIDES = (
    ("on the left", "on the right", "to the left of", "to the right of"),
    ("at the top", "at the bottom", "above", "below"),
)


def questions(scene: Scene, rng: np.random.Generator) -> list[Item]:
    """Ask everything that has one clear answer, each in one of its wordings.

    Questions to be answered yes or no come in pairs of one wording with one answer each.

    Args:
        scene: What to ask about.
        rng: Chooses wordings, spellings and what is absent.

    Returns:
        Task, question and whole-sentence answer of each.
    """
    makers: tuple[Callable[[Scene, np.random.Generator], list[Item]], ...] = (
        _name,
        _describe,
        _count,
        _colour,
        _background,
        _exists,
        _is_colour,
        _identify,
        _compare,
        _size,
        _position,
    )
    return [item for maker in makers for item in maker(scene, rng)]


def _name(scene: Scene, rng: np.random.Generator) -> list[Item]:
    groups = phrase_groups(scene)
    items = [("name", ask("name", rng), there(groups))]
    if len(scene.objects) == 1:
        thing = scene.objects[0]
        items.append(("name", ask("name_one", rng), f"It is {counted(groups[0])}."))
        if thing.category in (SHAPE, "animal"):
            items.append(("name", ask(f"name_{thing.category}", rng), f"It is {article(thing.kind)}."))
        options = [article(thing.kind), article(_missing(scene, rng)[0])]
        first, second = (options[int(index)] for index in rng.permutation(2))
        items.append(("name", ask("kind_choice", rng, first=first, second=second), f"It is {article(thing.kind)}."))
    elif all(thing.category == SHAPE for thing in scene.objects):
        kinds = sorted(by_kind(scene).values(), key=len, reverse=True)
        plain = listing([_numbered(things) for things in kinds])
        items.append(("kinds", ask("kinds", rng), f"There {verb_forms(kinds[0])['is']} {plain}."))
    return items


def _describe(scene: Scene, rng: np.random.Generator) -> list[Item]:
    listed = listing([counted(group) for group in phrase_groups(scene)])
    plain = scene.background in COLOURS
    ground = f" on {article(scene.background)} background" if plain else ""
    short = f"The picture shows {listed}{ground}."
    items = [("describe", ask("describe", rng), short)]
    items.append(("describe", ask("detail", rng), f"{short}{_placement(scene)}"))
    return items


def _placement(scene: Scene) -> str:
    """A sentence on where two things are, when that is clear."""
    names = single_names(scene)
    if len(scene.objects) != 2 or len(names) != 2:
        return ""
    (first, one), (second, other) = names.items()
    for axis, low, high in ((0, "on the left", "on the right"), (1, "at the top", "at the bottom")):
        if clearly_before(one, other, axis, scene.size):
            return f" The {first} is {low} and the {second} is {high}."
        if clearly_before(other, one, axis, scene.size):
            return f" The {second} is {low} and the {first} is {high}."
    return ""


def _count(scene: Scene, rng: np.random.Generator) -> list[Item]:
    items = []
    for things in by_kind(scene).values():
        kind, plural = things[0].kind, things[0].plural
        items.append(("count", ask("count", rng, things=plural), there_are(len(things), kind, plural)))
    singular, plural = general_noun(scene)
    if plural == "objects" or rng.random() < 0.5:
        plural = pick(rng, _COUNT_NOUNS)
        singular = plural[:-1]
    items.append(("count_total", ask("count", rng, things=plural), there_are(len(scene.objects), singular, plural)))
    if general_noun(scene)[0] == SHAPE and all(thing.colour for thing in scene.objects):
        colours = Counter(str(thing.colour) for thing in scene.objects)
        for colour, number in colours.items():
            phrase = there_are(number, f"{colour} shape", f"{colour} shapes")
            items.append(("count", ask("count", rng, things=f"{colour} shapes"), phrase))
        for group in phrase_groups(scene):
            if len(group) != len(by_kind(scene)[group[0].kind]):
                noun = noun_of(group[0], 2)
                items.append(
                    ("count", ask("count", rng, things=noun), there_are(len(group), noun_of(group[0], 1), noun))
                )
    if rng.random() < _NONE_SHARE:
        kind, plural = _missing(scene, rng)
        items.append(("count", ask("count", rng, things=plural), there_are(0, kind, plural)))
    return items


def _colour(scene: Scene, rng: np.random.Generator) -> list[Item]:
    items = []
    for things in by_kind(scene).values():
        colour = colour_of(things)
        if colour:
            noun = things[0].kind if len(things) == 1 else things[0].plural
            verbs = verb_forms(things)
            items.append(("colour", ask("color", rng, thing=noun, **verbs), f"The {noun} {verbs['is']} {colour}."))
    nouns = general_noun(scene)[1]
    if nouns == "shapes" and len(scene.objects) > 1 and all(thing.colour for thing in scene.objects):
        colours = [colour for colour, _ in Counter(str(thing.colour) for thing in scene.objects).most_common()]
        items.append(("colours", ask("colors", rng, nouns=nouns), f"The {nouns} are {listing(colours)}."))
    return items


def _background(scene: Scene, rng: np.random.Generator) -> list[Item]:
    if scene.background not in COLOURS:
        return []
    singular, plural = general_noun(scene)
    one = len(scene.objects) == 1
    question = ask("background", rng, all=singular if one else plural, **verb_forms(scene.objects))
    return [("background", question, f"The background is {scene.background}.")]


def _missing(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Something that is certainly not there, singular and plural; shapes for a record that names nothing absent."""
    absent = scene.absent or tuple(
        (kind, shape.plural)
        for kind, shape in SHAPES.items()
        if not any(confusable(kind, thing.kind) for thing in scene.objects)
    )
    return absent[int(rng.integers(len(absent)))]


def _exists(scene: Scene, rng: np.random.Generator) -> list[Item]:
    kinds = list(by_kind(scene).values())
    items = []
    for things in (kinds[int(index)] for index in rng.permutation(len(kinds))[:2]):
        kind, plural = things[0].kind, things[0].plural
        missing, missing_plural = _missing(scene, rng)
        yes, no = pair(
            "exists",
            rng,
            {"a": article(kind), "things": plural},
            {"a": article(missing), "things": missing_plural},
        )
        items.append(("exists", yes, f"Yes, there {verb_forms(things)['is']} {_numbered(things)}."))
        items.append(("exists", no, f"No, there is no {missing} in the picture."))
    return items + _category_exists(scene, rng) + _coloured_exists(scene, rng)


def _numbered(things: list[SceneObject]) -> str:
    """Things of one kind as they are listed when colours do not matter."""
    return article(things[0].kind) if len(things) == 1 else f"{NUMBERS[len(things)]} {things[0].plural}"


def _category_exists(scene: Scene, rng: np.random.Generator) -> list[Item]:
    present = {thing.category for thing in scene.objects}
    if not present <= _CLEAR_CATEGORIES or present == {SHAPE}:
        return []
    category = pick(rng, sorted(present))
    other = pick(rng, sorted(_CLEAR_CATEGORIES - present - {SHAPE}))
    things = next(things for things in by_kind(scene).values() if things[0].category == category)
    yes, no = pair(
        "exists",
        rng,
        {"a": article(category), "things": f"{category}s"},
        {"a": article(other), "things": f"{other}s"},
    )
    return [
        ("exists", yes, f"Yes, there {verb_forms(things)['is']} {_numbered(things)}."),
        ("exists", no, f"No, there is no {other} in the picture."),
    ]


def _coloured_exists(scene: Scene, rng: np.random.Generator) -> list[Item]:
    shapes = [group for group in phrase_groups(scene) if group[0].category == SHAPE and group[0].colour]
    if not shapes:
        return []
    group = shapes[int(rng.integers(len(shapes)))]
    thing = group[0]
    colours = {other.colour for other in scene.objects if other.kind == thing.kind}
    if None in colours:
        return []
    other = pick(rng, [colour for colour in COLOURS if colour not in colours])
    yes, no = pair(
        "exists",
        rng,
        {"a": article(noun_of(thing, 1)), "things": noun_of(thing, 2)},
        {"a": article(f"{other} {thing.kind}"), "things": f"{other} {thing.plural}"},
    )
    return [
        ("exists", yes, f"Yes, there {verb_forms(group)['is']} {counted(group)}."),
        ("exists", no, f"No, there is no {other} {thing.kind} in the picture."),
    ]


def _is_colour(scene: Scene, rng: np.random.Generator) -> list[Item]:
    known = [things for things in by_kind(scene).values() if colour_of(things)]
    if not known:
        return []
    things = known[int(rng.integers(len(known)))]
    colour = str(colour_of(things))
    noun = things[0].kind if len(things) == 1 else things[0].plural
    verbs = verb_forms(things)
    seen = sorted({str(thing.colour) for thing in scene.objects if thing.colour} - {colour})
    near = seen if seen and rng.random() < 0.5 else [word for word in COLOURS if word != colour]
    parts = {"thing": noun, **verbs}
    yes, no = pair("is_color", rng, {**parts, "word": colour}, {**parts, "word": pick(rng, near)})
    fact = f"the {noun} {verbs['is']} {colour}."
    options = [colour, pick(rng, near)]
    word, other = (options[int(index)] for index in rng.permutation(2))
    choice = ask("color_choice", rng, **parts, word=word, other=other)
    return [
        ("is_colour", yes, f"Yes, {fact}"),
        ("is_colour", no, f"No, {fact}"),
        ("colour", choice, fact[0].upper() + fact[1:]),
    ]


def _identify(scene: Scene, rng: np.random.Generator) -> list[Item]:
    if len(scene.objects) < 2 or any(thing.category != SHAPE or not thing.colour for thing in scene.objects):
        return []
    colours = Counter(thing.colour for thing in scene.objects)
    single = [thing for thing in scene.objects if colours[thing.colour] == 1 and thing.colour != scene.background]
    if not single or len(by_kind(scene)) < 2:
        return []
    thing = single[int(rng.integers(len(single)))]
    question = ask("identify", rng, noun="shape", nouns="shapes", word=str(thing.colour))
    return [("identify", question, f"The {thing.colour} shape is {article(thing.kind)}.")]


def _compare(scene: Scene, rng: np.random.Generator) -> list[Item]:
    kinds = sorted(by_kind(scene).values(), key=len, reverse=True)
    if len(kinds) < 2 or len(kinds[0]) == len(kinds[1]):
        return []
    more, fewer = kinds[0][0].plural, kinds[1][0].plural
    yes, no = pair("more", rng, {"first": more, "second": fewer}, {"first": fewer, "second": more})
    first, second = (more, fewer) if rng.random() < 0.5 else (fewer, more)
    return [
        ("compare", yes, f"Yes, there are more {more} than {fewer}."),
        ("compare", no, f"No, there are more {more} than {fewer}."),
        ("compare", ask("which_more", rng, first=first, second=second), f"There are more {more} than {fewer}."),
    ]


def _size(scene: Scene, rng: np.random.Generator) -> list[Item]:
    names = list(single_names(scene).items())
    if len(names) < 2:
        return []
    first, second = (names[int(index)] for index in rng.permutation(len(names))[:2])
    ratio = first[1].area / second[1].area
    if 1 / _BIGGER < ratio < _BIGGER:
        return []
    bigger, smaller = (first[0], second[0]) if ratio > 1 else (second[0], first[0])
    question = ask("size", rng, first=first[0], second=second[0])
    return [("size", question, f"The {bigger} is bigger than the {smaller}.")]


def _position(scene: Scene, rng: np.random.Generator) -> list[Item]:
    names = list(single_names(scene).items())
    pairs = [
        (first, second, axis)
        for first in names
        for second in names
        for axis in (0, 1)
        if first[0] != second[0] and clearly_before(first[1], second[1], axis, scene.size)
    ]
    if not pairs:
        return []
    (first, _), (second, _), axis = pairs[int(rng.integers(len(pairs)))]
    low, high, before, after = _SIDES[axis]
    if rng.random() < 0.5:
        first, second, low, high, before, after = second, first, high, low, after, before
    yes, no = pair(
        "relation",
        rng,
        {"first": first, "relation": before, "second": second},
        {"first": first, "relation": after, "second": second},
    )
    fact = f"the {first} is {before} the {second}."
    items = [("position", yes, f"Yes, {fact}"), ("position", no, f"No, {fact}")]
    if len(scene.objects) == 2:
        items.append(("position", ask("where", rng, side=low), f"The {first} is {low}."))
        items.append(
            ("position", ask("beside", rng, relation=before, other=second), f"The {first} is {before} the {second}.")
        )
    return items
