"""Drawn scenes with exact ground truth: a picture and the record of what is in it, from one random generator.

What is said about a scene is made by `nano.scenes.text`, whose functions are offered here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nano.scenes.backgrounds import paint_background
from nano.scenes.colours import RGB, sample_colour, to_lab
from nano.scenes.plan import Plan, absent_kinds, plan_scene
from nano.scenes.questions import questions
from nano.scenes.record import Box, Scene, SceneObject, overlap, reading_order
from nano.scenes.shapes import ShapeStyle, paint_shape, sample_style
from nano.scenes.text import caption, dialogue
from nano.sprites import Sprites

__all__ = ["Scene", "SceneObject", "caption", "dialogue", "draw_scene", "questions"]

_LARGEST = (0.70, 0.46, 0.40, 0.34, 0.30, 0.27)
"""Largest side of a thing as a fraction of the picture's, by the number of things."""
_SMALLEST = 0.14
_MARGIN = 0.02
_GAP = 3
_OVERLAP = 0.1
_CONTRAST = 26.0
_SPRITE_CONTRAST = 20.0
_PLACES = 30
_PLANS_PER_BACKGROUND = 3


@dataclass(frozen=True)
class _Ground:
    """What is drawn on: the name and the pixels, shape (size, size, 3), of the background."""

    name: str
    pixels: NDArray[np.uint8]

    @property
    def size(self) -> int:
        return int(self.pixels.shape[0])


@dataclass(frozen=True)
class _Cutout:
    """A painted thing before it has a place: its picture, its colour, and the box of its solid pixels."""

    picture: Image.Image
    plan: Plan
    colour: str | None
    rgb: RGB | None
    solid: Box


@dataclass(frozen=True)
class _Placed:
    cutout: _Cutout
    corner: tuple[int, int]
    box: Box


def draw_scene(
    rng: np.random.Generator,
    sprites: Sprites | None = None,
    size: int = 224,
    backgrounds: Sequence[Image.Image] | None = None,
) -> tuple[Image.Image, Scene]:
    """Draw one scene, a function of the generator's state and the other arguments alone.

    Args:
        rng: Source of every choice.
        sprites: Named drawings to use beside shapes; None draws shapes only.
        size: Side of the picture in pixels, at least 64.
        backgrounds: Photographs to crop backgrounds from.

    Returns:
        The picture (RGB, size x size) and its record, objects in reading order.
    """
    while True:
        ground = _Ground(*paint_background(rng, size, backgrounds))
        for _ in range(_PLANS_PER_BACKGROUND):
            plans = plan_scene(rng, sprites)
            placed = _arrange(rng, plans, ground, sprites)
            if placed is not None:
                objects = [_record(item) for item in placed]
                absent = absent_kinds(rng, plans, sprites)
                return _compose(ground, placed), Scene(ground.name, tuple(reading_order(objects, size)), absent, size)


def _compose(ground: _Ground, placed: Sequence[_Placed]) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(ground.pixels))
    for item in placed:
        picture.paste(item.cutout.picture, item.corner, item.cutout.picture)
    return picture


def _record(item: _Placed) -> SceneObject:
    plan = item.cutout.plan
    return SceneObject(plan.kind, plan.plural, item.cutout.colour, item.box, plan.category)


def _arrange(
    rng: np.random.Generator, plans: Sequence[Plan], ground: _Ground, sprites: Sprites | None
) -> list[_Placed] | None:
    """Paint and place every planned thing, or return None when there is no room or no contrast."""
    count = len(plans)
    largest = float(rng.uniform(max(_SMALLEST, 0.5 * _LARGEST[count - 1]), _LARGEST[count - 1]))
    equal = rng.random() < 0.5
    style = sample_style(rng)
    touching = rng.random() < 0.12
    cells = _cells(rng, count, ground.size) if rng.random() < 0.3 and count > 1 else [None] * count
    placed: list[_Placed] = []
    for plan, cell in zip(plans, cells, strict=True):
        side = largest if equal else float(rng.uniform(max(_SMALLEST, 0.45 * largest), largest))
        own = style if rng.random() < 0.85 else sample_style(rng)
        cutout = _cut_out(rng, plan, round(side * ground.size), own, sprites)
        item = _place(rng, cutout, cell, ground, placed, touching)
        if item is None:
            return None
        placed.append(item)
    return placed


def _cells(rng: np.random.Generator, count: int, size: int) -> list[tuple[float, float] | None]:
    """Centres of a tidy arrangement: a row, a column or a grid."""
    columns = count if rng.random() < 0.5 else 1 if rng.random() < 0.3 else int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    return [
        (size * (number % columns + 0.5) / columns, size * (number // columns + 0.5) / rows) for number in range(count)
    ]


def _cut_out(rng: np.random.Generator, plan: Plan, side: int, style: ShapeStyle, sprites: Sprites | None) -> _Cutout:
    if plan.colour is not None:
        rgb = sample_colour(plan.colour, rng)
        picture = paint_shape(plan.kind, plan.colour, rgb, side, style, rng)
        return _Cutout(picture, plan, plan.colour, rgb, _solid(picture))
    drawing = plan.drawings[int(rng.integers(len(plan.drawings)))]
    if sprites is None:
        raise TypeError("a sprite was planned without sprites")
    picture = sprites.picture(drawing)
    if rng.random() < 0.25:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tilt = float(rng.uniform(-20, 20)) if rng.random() < 0.35 else 0.0
    picture = _scaled(picture, side)
    if tilt:
        picture = picture.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
        picture = _scaled(picture.crop(picture.getchannel("A").getbbox()), side)
    return _Cutout(picture, plan, drawing.colour, None, _solid(picture))


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    width, height = (max(1, round(extent * scale)) for extent in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _solid(picture: Image.Image) -> Box:
    """Box of the pixels that are more opaque than a shadow."""
    return picture.getchannel("A").point(lambda level: 255 * (level >= 128)).getbbox() or (0, 0, *picture.size)


def _place(
    rng: np.random.Generator,
    cutout: _Cutout,
    cell: tuple[float, float] | None,
    ground: _Ground,
    placed: Sequence[_Placed],
    touching: bool,
) -> _Placed | None:
    """Find a place that is free and where the thing stands out, or return None."""
    if cutout.rgb is not None and cutout.colour == ground.name:
        return None
    solid, size = cutout.solid, ground.size
    margin = round(_MARGIN * size)
    for _ in range(_PLACES):
        if cell is None:
            left, top = (
                int(rng.integers(margin, size - margin - (solid[axis + 2] - solid[axis]) + 1)) for axis in (0, 1)
            )
        else:
            left, top = (round(cell[axis] - (solid[axis + 2] - solid[axis]) / 2 + rng.normal(0, 2)) for axis in (0, 1))
        box = (left, top, left + solid[2] - solid[0], top + solid[3] - solid[1])
        inside = min(box) >= 0 and max(box) <= size
        if inside and _free(box, placed, touching) and _stands_out(cutout, box, ground):
            return _Placed(cutout, (left - solid[0], top - solid[1]), box)
    return None


def _free(box: Box, placed: Sequence[_Placed], touching: bool) -> bool:
    if touching:
        return all(overlap(box, other.box) < _OVERLAP for other in placed)
    wide = (box[0] - _GAP, box[1] - _GAP, box[2] + _GAP, box[3] + _GAP)
    return all(overlap(wide, other.box) == 0 for other in placed)


def _stands_out(cutout: _Cutout, box: Box, ground: _Ground) -> bool:
    """Whether the thing's colour is far from the background it lies on."""
    behind = to_lab(ground.pixels[box[1] : box[3] : 4, box[0] : box[2] : 4].reshape(-1, 3))
    if cutout.rgb is not None:
        distance = np.linalg.norm(behind - to_lab(cutout.rgb), axis=1)
        return float((distance < _CONTRAST).mean()) < 0.1
    own = np.asarray(cutout.picture.crop(cutout.solid))[::4, ::4].reshape(-1, 4)
    own = own[own[:, 3] > 200, :3]
    distance = np.linalg.norm(to_lab(own) - behind.mean(axis=0), axis=1)
    return len(own) > 0 and float((distance > _SPRITE_CONTRAST).mean()) > 0.65
