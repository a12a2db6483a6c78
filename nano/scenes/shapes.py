"""Geometric shapes painted as small transparent pictures, in many styles.

A shape is a closed outline of points in the square from -1 to 1; every style is a way of painting such an outline.
Knows nothing of scenes: where a shape goes and what is said about it is decided elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from nano.scenes.colours import RGB, sample_colour

Outline = NDArray[np.float64]
_SUPERSAMPLE = 3
_CURVE = 72
_THINNEST_OUTLINE = 3.0
_THINNEST_BORDER = 1.5


@dataclass(frozen=True)
class ShapeKind:
    """A family of outlines.

    Args:
        plural: Its name in the plural.
        outline: Draws one member from a random generator; returns points of shape (count, 2), y downwards.
        turn: Largest rotation either way, in degrees, at which the name still holds.
        hole: Radius of a hole in the middle as a range of fractions, or None.
    """

    plural: str
    outline: Callable[[np.random.Generator], Outline]
    turn: float = 180.0
    hole: tuple[float, float] | None = None


def _arc(start: float, stop: float, count: int = _CURVE) -> Outline:
    angle = np.radians(np.linspace(start, stop, count))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _regular(corners: int) -> Outline:
    angle = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _circle(rng: np.random.Generator) -> Outline:
    return _arc(0, 360)[:-1]


def _oval(rng: np.random.Generator) -> Outline:
    return _circle(rng) * _flat(rng, 0.45, 0.7)


def _square(rng: np.random.Generator) -> Outline:
    return np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]) / math.sqrt(2)


def _rectangle(rng: np.random.Generator) -> Outline:
    return _square(rng) * _flat(rng, 0.38, 0.66)


def _flat(rng: np.random.Generator, low: float, high: float) -> Outline:
    ratio = float(rng.uniform(low, high))
    return np.array([1.0, ratio] if rng.random() < 0.6 else [ratio, 1.0])


def _triangle(rng: np.random.Generator) -> Outline:
    if rng.random() < 0.6:
        return _regular(3)
    return np.array([[rng.uniform(-0.9, 0.9), -1.0], [1.0, rng.uniform(0.6, 0.9)], [-1.0, rng.uniform(0.6, 0.9)]])


def _star(rng: np.random.Generator) -> Outline:
    corners = 5 if rng.random() < 0.8 else int(rng.choice([6, 8]))
    points = _regular(2 * corners)
    points[1::2] *= rng.uniform(0.36, 0.52) if corners == 5 else rng.uniform(0.45, 0.6)
    return points


def _heart(rng: np.random.Generator) -> Outline:
    angle = np.linspace(0, 2 * np.pi, _CURVE, endpoint=False)
    x = 16 * np.sin(angle) ** 3
    y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return np.stack([x / 16.5, -(y + 2.5) / 16.5 * rng.uniform(0.9, 1.1)], axis=1)


def _diamond(rng: np.random.Generator) -> Outline:
    points = _regular(4)
    points[:, 0] *= rng.uniform(0.58, 0.8)
    return points


def _pentagon(rng: np.random.Generator) -> Outline:
    return _regular(5)


def _hexagon(rng: np.random.Generator) -> Outline:
    return _regular(6)


def _cross(rng: np.random.Generator) -> Outline:
    arm = float(rng.uniform(0.22, 0.38))
    quarter = np.array([[-arm, -1.0], [arm, -1.0], [arm, -arm]])
    turns = [np.array([[0, 1], [-1, 0]]), np.array([[-1, 0], [0, -1]]), np.array([[0, -1], [1, 0]])]
    return np.concatenate([quarter, *(quarter @ turn for turn in turns)])


def _arrow(rng: np.random.Generator) -> Outline:
    shaft, head, neck = rng.uniform(0.14, 0.32), rng.uniform(0.5, 0.75), rng.uniform(-0.1, 0.4)
    half = np.array([[-1.0, -shaft], [neck, -shaft], [neck, -head]])
    return np.concatenate([half, [[1.0, 0.0]], (half * [1, -1])[::-1]])


def _crescent(rng: np.random.Generator) -> Outline:
    tip = float(rng.uniform(35, 60))
    outer = _arc(tip, 360 - tip)
    corner = outer[0]
    centre = float(rng.uniform(0.35, 0.55))
    radius = math.hypot(corner[0] - centre, corner[1])
    inner_tip = math.degrees(math.atan2(corner[1], corner[0] - centre))
    inner = radius * _arc(360 - inner_tip, inner_tip) + [centre, 0]
    return np.concatenate([outer, inner[1:-1]])


SHAPES: dict[str, ShapeKind] = {
    "circle": ShapeKind("circles", _circle),
    "square": ShapeKind("squares", _square, turn=18),
    "rectangle": ShapeKind("rectangles", _rectangle),
    "triangle": ShapeKind("triangles", _triangle),
    "star": ShapeKind("stars", _star),
    "heart": ShapeKind("hearts", _heart, turn=35),
    "diamond": ShapeKind("diamonds", _diamond, turn=12),
    "pentagon": ShapeKind("pentagons", _pentagon),
    "hexagon": ShapeKind("hexagons", _hexagon),
    "oval": ShapeKind("ovals", _oval),
    "cross": ShapeKind("crosses", _cross, turn=45),
    "arrow": ShapeKind("arrows", _arrow),
    "crescent": ShapeKind("crescents", _crescent),
    "ring": ShapeKind("rings", _circle, hole=(0.5, 0.72)),
}

LOOKALIKES: tuple[frozenset[str], ...] = tuple(
    frozenset(pair)
    for pair in (
        ("square", "rectangle"),
        ("square", "diamond"),
        ("rectangle", "diamond"),
        ("circle", "oval"),
        ("circle", "ring"),
        ("oval", "ring"),
        ("crescent", "moon"),
        ("ring", "diamond ring"),
    )
)
"""Pairs that people do not always tell apart: never in one scene, and never asked about when the other is there."""


@dataclass(frozen=True)
class ShapeStyle:
    """How an outline is painted; one style is usually shared by all the shapes of a scene.

    Args:
        paint: `"filled"`, `"gradient"`, `"outline"` or `"speckled"`.
        line: Width of the outline as a fraction of the side; 0 for none.
        dark_line: Whether the outline of a painted shape is darker than its inside.
        shadow: Whether it throws a soft shadow.
        jitter: Size of hand-drawn wobble as a fraction of the side.
        rounding: Radius of rounded corners as a fraction of the side.
        smooth: Whether edges are anti-aliased.
    """

    paint: str
    line: float
    dark_line: bool
    shadow: bool
    jitter: float
    rounding: float
    smooth: bool


def sample_style(rng: np.random.Generator) -> ShapeStyle:
    """Draw a style."""
    paint = str(rng.choice(["filled", "gradient", "outline", "speckled"], p=[0.6, 0.13, 0.19, 0.08]))
    bordered = paint != "outline" and rng.random() < 0.25
    thick = rng.random() < 0.5
    line = float(rng.uniform(0.07, 0.1) if thick else rng.uniform(0.03, 0.06))
    return ShapeStyle(
        paint=paint,
        line=line if paint == "outline" else line * 0.5 if bordered else 0.0,
        dark_line=bordered,
        shadow=paint != "outline" and bool(rng.random() < 0.14),
        jitter=float(rng.uniform(0.005, 0.018)) if rng.random() < 0.2 else 0.0,
        rounding=float(rng.uniform(0.02, 0.06)) if rng.random() < 0.15 else 0.0,
        smooth=bool(rng.random() < 0.85),
    )


def paint_shape(
    kind: str, colour: str, rgb: RGB, side: int, style: ShapeStyle, rng: np.random.Generator
) -> Image.Image:
    """Paint one shape.

    Args:
        kind: A key of `SHAPES`.
        colour: The word for `rgb`, from which a gradient takes its second colour.
        rgb: Main colour.
        side: Longest side of the result in pixels, a shadow apart.
        style: How to paint it.
        rng: Source of form, rotation and wobble.

    Returns:
        An RGBA picture cropped to its visible pixels.
    """
    family = SHAPES[kind]
    style = _suited(kind, style)
    points = _wobble(family.outline(rng), style.jitter, rng)
    points = _turned(points, float(rng.uniform(-family.turn, family.turn)) if rng.random() < 0.6 else 0.0)
    hole = float(rng.uniform(*family.hole)) if family.hole else None
    big = side * _SUPERSAMPLE
    thinnest = _THINNEST_OUTLINE if style.paint == "outline" else _THINNEST_BORDER
    line = max(style.line * big, thinnest * _SUPERSAMPLE) if style.line else 0.0
    placed = _fitted(points, math.ceil(line / 2) + 1, big)
    fill = _fill(colour, rgb, side, style, rng)
    stroke = _reduced(_stroke(placed, hole, big, line), style.smooth) if line else None
    if style.paint == "outline" and stroke is not None:
        picture = Image.merge("RGBA", (*fill.split(), stroke))
    else:
        inside = _reduced(_inside(placed, hole, big, style.rounding * big), style.smooth)
        picture = Image.merge("RGBA", (*fill.split(), inside))
        if stroke is not None:
            picture = _bordered(picture, rgb, stroke)
    if style.shadow:
        picture = _shadowed(picture, side, rng)
    return picture.crop(picture.getbbox())


def _suited(kind: str, style: ShapeStyle) -> ShapeStyle:
    """Avoid what would turn one shape into another: an outlined ring is two circles, a fat-lined circle is a ring."""
    if kind == "ring":
        paint = "filled" if style.paint == "outline" else style.paint
        return replace(style, paint=paint, line=0.0, rounding=0.0)
    if kind in ("circle", "oval"):
        return replace(style, line=min(style.line, 0.045))
    if kind in ("crescent", "arrow", "star", "cross"):
        return replace(style, line=min(style.line, 0.06), rounding=0.0)
    return style


def _wobble(points: Outline, amount: float, rng: np.random.Generator) -> Outline:
    if not amount:
        return points
    closed = np.concatenate([points, points[:1]])
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
    where = np.linspace(0, length[-1], 60, endpoint=False)
    where = np.unique(np.concatenate([where, length[:-1]]))
    dense = np.stack([np.interp(where, length, closed[:, axis]) for axis in (0, 1)], axis=1)
    phase, waves = rng.uniform(0, 2 * np.pi, (2, 4)), np.arange(2, 6)
    turn = 2 * np.pi * where / length[-1]
    wave: Outline = np.sin(turn[:, None, None] * waves + phase).sum(axis=2) / 2
    return dense + 2 * amount * wave


def _turned(points: Outline, degrees: float) -> Outline:
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    turned: Outline = points @ np.array([[cosine, sine], [-sine, cosine]])
    return turned


def _fitted(points: Outline, pad: float, big: int) -> Outline:
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (big - 2 * pad) / float((high - low).max())
    fitted: Outline = (points - (low + high) / 2) * scale + big / 2
    return fitted


def _loops(points: Outline, hole: float | None, big: int) -> list[list[tuple[float, float]]]:
    """The outer outline and that of the hole, as Pillow wants them."""
    loops = [points] if hole is None else [points, (points - big / 2) * hole + big / 2]
    return [[(float(x), float(y)) for x, y in loop] for loop in loops]


def _inside(points: Outline, hole: float | None, big: int, rounding: float) -> Image.Image:
    mask = Image.new("L", (big, big))
    for number, loop in enumerate(_loops(points, hole, big)):
        ImageDraw.Draw(mask).polygon(loop, fill=0 if number else 255)
    if rounding:
        # Blurring and cutting at half height takes the corners off and leaves straight edges where they were.
        mask = mask.filter(ImageFilter.BoxBlur(rounding)).point(lambda level: 255 * (level >= 128))
    return mask


def _stroke(points: Outline, hole: float | None, big: int, line: float) -> Image.Image:
    mask = Image.new("L", (big, big))
    draw, radius = ImageDraw.Draw(mask), line / 2
    for loop in _loops(points, hole, big):
        draw.line([*loop, loop[0]], fill=255, width=round(line))
        for x, y in loop:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def _reduced(mask: Image.Image, smooth: bool) -> Image.Image:
    small = mask.reduce(_SUPERSAMPLE)
    return small if smooth else small.point(lambda level: 255 * (level >= 128))


def _bordered(picture: Image.Image, rgb: RGB, stroke: Image.Image) -> Image.Image:
    """Draw the outline in a darker shade of the shape's colour."""
    red, green, blue = (int(channel * 0.45) for channel in rgb)
    layer = Image.new("RGBA", picture.size, (red, green, blue, 0))
    layer.putalpha(stroke)
    return Image.alpha_composite(picture, layer)


def _fill(colour: str, rgb: RGB, side: int, style: ShapeStyle, rng: np.random.Generator) -> Image.Image:
    if style.paint == "gradient":
        ramp = Image.linear_gradient("L").rotate(float(rng.integers(4)) * 90).resize((side, side))
        other = sample_colour(colour, rng)
        return Image.composite(Image.new("RGB", (side, side), rgb), Image.new("RGB", (side, side), other), ramp)
    if style.paint == "speckled":
        noise = rng.normal(0, 9, (side, side, 1)) + np.array(rgb)
        return Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    return Image.new("RGB", (side, side), rgb)


def _shadowed(picture: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    reach = max(3, round(side * float(rng.uniform(0.03, 0.06))))
    canvas = Image.new("RGBA", (side + 3 * reach, side + 3 * reach))
    soft = Image.new("L", canvas.size)
    soft.paste(picture.getchannel("A").point(lambda level: level * 0.45), (2 * reach, 2 * reach))
    canvas.putalpha(soft.filter(ImageFilter.GaussianBlur(reach / 2)))
    canvas.alpha_composite(picture, (reach, reach))
    return canvas
