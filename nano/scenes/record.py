"""What is in a drawn scene: the record from which every caption, question and answer is made.

Knows nothing of how a scene is drawn and nothing of how it is spoken about.
"""

from dataclasses import dataclass

SHAPE = "shape"
"""Category of the drawn geometric shapes."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SceneObject:
    """One visible thing.

    Args:
        kind: Its everyday name in the singular, such as `"circle"` or `"dog"`.
        plural: The same name in the plural.
        colour: Its colour word, or None when no single colour is clear.
        box: Left, top, right and bottom of its visible pixels, right and bottom exclusive.
        category: The class of thing it is: `"shape"`, `"animal"`, `"fruit"`, ..., `"object"` when nothing closer fits.
    """

    kind: str
    plural: str
    colour: str | None
    box: Box
    category: str = SHAPE

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box in pixels, x then y."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> int:
        """Area of the box in pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class Scene:
    """The whole picture.

    Args:
        background: A colour word for a plain background, else what it is: `"tint"` (a pale colour without a word),
            `"gradient"`, `"noise"`, `"horizon"`, `"photo"`.
        objects: The things in it, in reading order.
        absent: Names (singular, plural) that are certainly not in the picture, to ask about.
        size: Side of the picture in pixels.
    """

    background: str
    objects: tuple[SceneObject, ...]
    absent: tuple[tuple[str, str], ...] = ()
    size: int = 224


def reading_order(objects: list[SceneObject], size: int) -> list[SceneObject]:
    """Sort by thirds of the picture from top to bottom, and from left to right within a third."""
    return sorted(objects, key=lambda item: (int(3 * item.centre[1] / size), item.centre[0], item.centre[1]))


def overlap(first: Box, second: Box) -> float:
    """Shared area of two boxes as a fraction of the smaller one, 0 to 1."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return width * height / smaller
