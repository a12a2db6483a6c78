"""What a scene is to show, decided before it is drawn: kinds, numbers, colour words, and what is certainly absent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nano.scenes.colours import COLOURS
from nano.scenes.record import SHAPE
from nano.scenes.shapes import LOOKALIKES, SHAPES
from nano.sprite_names import NEAR_NAMES
from nano.sprites import Concept, Drawing, Sprites

_COUNT_SHARES = (0.29, 0.27, 0.24, 0.11, 0.05, 0.04)
_MODES = {"alike": 0.50, "colours": 0.15, "kinds": 0.35}
_SPRITE_SHARES = {0.0: 0.45, 1.0: 0.40, 0.5: 0.15}
_ABSENT = 6
_NEAR: dict[str, set[str]] = {}
for _group in (*LOOKALIKES, *NEAR_NAMES):
    for _name in _group:
        _NEAR.setdefault(_name, set()).update(_group)
_COMMON_WORDS = frozenset({"of", "pair"})


@dataclass(frozen=True)
class Plan:
    """One thing to draw.

    Args:
        kind: Its name.
        plural: Its name in the plural.
        category: Its class of thing.
        colour: Colour word of a drawn shape, None for a sprite.
        drawings: Drawings of a sprite to choose from; empty for a drawn shape.
        tags: Other words that may be said of it.
    """

    kind: str
    plural: str
    category: str
    colour: str | None = None
    drawings: tuple[Drawing, ...] = ()
    tags: frozenset[str] = frozenset()


def confusable(first: str, second: str) -> bool:
    """Whether a thing of one name might be called by the other."""
    if set(first.split()) & set(second.split()) - _COMMON_WORDS:
        return True
    return second in _NEAR.get(first, ())


def plan_scene(rng: np.random.Generator, sprites: Sprites | None) -> list[Plan]:
    """Choose one to six things: all alike, alike but for their colours, or of two or three kinds."""
    count = 1 + int(rng.choice(len(_COUNT_SHARES), p=_COUNT_SHARES))
    mode = str(rng.choice(list(_MODES), p=list(_MODES.values())))
    kinds = int(rng.integers(2, min(count, 3) + 1)) if mode == "kinds" and count > 1 else 1
    repeats = rng.multinomial(count - kinds, np.full(kinds, 1 / kinds)) + 1
    plans = []
    for model, number in zip(_kinds(rng, kinds, sprites), repeats, strict=True):
        plans += _repeat(rng, model, int(number), mode)
    return plans


def absent_kinds(
    rng: np.random.Generator, plans: Sequence[Plan], sprites: Sprites | None
) -> tuple[tuple[str, str], ...]:
    """Name things that are certainly not in the picture, about half of them of the same class as what is there.

    Args:
        rng: Chooses them.
        plans: What is in the picture.
        sprites: Where names of other things come from; only shapes are named without it.

    Returns:
        Up to six names, each in the singular and the plural.
    """
    candidates: list[Plan] = []
    # A ball may pass for a circle and a door for a rectangle: beside such things nobody is asked for shapes.
    if all(plan.category in (SHAPE, "animal") for plan in plans):
        shapes = [_shape(str(kind)) for kind in rng.permutation(list(SHAPES))]
        drawn = any(plan.category == SHAPE for plan in plans)
        candidates = shapes if drawn and sprites is None else shapes[: 5 if drawn else 2]
    if sprites is not None:
        others = [_sprite(concept) for concept in sprites.sample(rng, 60)]
        classes = {plan.category for plan in plans}
        near = [other for other in others if other.category in classes][:5]
        candidates += near + others[:4]
    fitting = [candidate for candidate in candidates if not any(_clash(candidate, plan) for plan in plans)]
    chosen = [fitting[int(index)] for index in rng.permutation(len(fitting))[:_ABSENT]]
    return tuple(dict.fromkeys((plan.kind, plan.plural) for plan in chosen))


def _repeat(rng: np.random.Generator, model: Plan, number: int, mode: str) -> list[Plan]:
    if model.drawings:
        one_style = rng.random() < 0.6
        chosen = model.drawings[int(rng.integers(len(model.drawings)))]
        drawings = (chosen,) if one_style else model.drawings
        return [Plan(model.kind, model.plural, model.category, None, drawings, model.tags)] * number
    shared = mode == "alike" or (mode == "kinds" and rng.random() < 0.6)
    colours = [str(colour) for colour in rng.choice(COLOURS, size=number)]
    return [
        Plan(model.kind, model.plural, model.category, colours[0] if shared else colour, (), model.tags)
        for colour in colours
    ]


def _kinds(rng: np.random.Generator, count: int, sprites: Sprites | None) -> list[Plan]:
    """Choose kinds of which none can be taken for another."""
    share = 0.0 if sprites is None else float(rng.choice(list(_SPRITE_SHARES), p=list(_SPRITE_SHARES.values())))
    chosen: list[Plan] = []
    while len(chosen) < count:
        if sprites is not None and rng.random() < share:
            candidate = _sprite(sprites.sample(rng, 1)[0])
        else:
            candidate = _shape(str(rng.choice(list(SHAPES))))
        if not any(_clash(candidate, other) for other in chosen):
            chosen.append(candidate)
    return chosen


def _clash(first: Plan, second: Plan) -> bool:
    return (
        confusable(first.kind, second.kind)
        or bool(set(first.kind.split()) & second.tags)
        or bool(set(second.kind.split()) & first.tags)
    )


def _shape(kind: str) -> Plan:
    return Plan(kind, SHAPES[kind].plural, SHAPE)


def _sprite(concept: Concept) -> Plan:
    return Plan(concept.kind, concept.plural, concept.category, None, concept.drawings, concept.tags)
