"""Colour words and the colours they stand for.

Sampling uses narrow HSV boxes, so that nobody would dispute the word; naming uses wider regions and answers None
between them. Knows nothing of shapes and scenes.
"""

import colorsys

import numpy as np
from numpy.typing import NDArray

RGB = tuple[int, int, int]
HSVBox = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

COLOUR_RANGES: dict[str, tuple[HSVBox, ...]] = {
    "red": (((350, 366), (0.80, 1.0), (0.70, 1.0)),),
    "orange": (((23, 39), (0.80, 1.0), (0.92, 1.0)),),
    "yellow": (((48, 61), (0.60, 1.0), (0.90, 1.0)),),
    "green": (((88, 150), (0.50, 1.0), (0.42, 1.0)), ((92, 140), (0.35, 0.50), (0.65, 0.92))),
    "blue": (((208, 242), (0.60, 1.0), (0.50, 1.0)), ((196, 220), (0.40, 0.60), (0.88, 1.0))),
    "purple": (((266, 292), (0.42, 1.0), (0.42, 0.85)), ((292, 301), (0.60, 1.0), (0.38, 0.60))),
    "pink": (((318, 345), (0.28, 0.68), (0.93, 1.0)), ((345, 352), (0.22, 0.38), (0.95, 1.0))),
    "brown": (((16, 32), (0.50, 0.92), (0.32, 0.56)),),
    "black": (((0, 360), (0.0, 0.30), (0.0, 0.13)),),
    "white": (((0, 360), (0.0, 0.03), (0.96, 1.0)),),
    "gray": (((0, 360), (0.0, 0.06), (0.40, 0.68)),),
}
"""Per word, boxes of hue (degrees, may pass 360), saturation and value (0 to 1). No two words share a point."""

PURE_COLOURS: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 20, 30)),
    "orange": ((255, 165, 0), (255, 140, 0)),
    "yellow": ((255, 255, 0), (255, 215, 0)),
    "green": ((0, 128, 0), (0, 255, 0), (0, 160, 0), (34, 139, 34)),
    "blue": ((0, 0, 255), (30, 90, 220)),
    "purple": ((128, 0, 128), (128, 0, 200)),
    "pink": ((255, 192, 203), (255, 105, 180)),
    "brown": ((139, 69, 19), (120, 70, 30)),
    "black": ((0, 0, 0),),
    "white": ((255, 255, 255),),
    "gray": ((128, 128, 128), (150, 150, 150)),
}
"""The colours that programs and palettes give these names; drawn more often than chance would."""

_PURE_SHARE = 0.3

COLOURS = tuple(COLOUR_RANGES)
_NO_WORD = -1


def sample_colour(word: str, rng: np.random.Generator) -> RGB:
    """Draw one colour that the word describes; returns red, green, blue in 0..255."""
    if rng.random() < _PURE_SHARE:
        pure = PURE_COLOURS[word]
        return pure[int(rng.integers(len(pure)))]
    boxes = COLOUR_RANGES[word]
    box = boxes[int(rng.integers(len(boxes)))]
    hue, saturation, value = (float(rng.uniform(low, high)) for low, high in box)
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def name_pixels(pixels: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Index into `COLOURS` for every pixel, -1 where no word is clear.

    Args:
        pixels: Red, green, blue in 0..255, shape (..., 3).

    Returns:
        The indices, shape (...).
    """
    rgb: NDArray[np.float32] = pixels.astype(np.float32) / np.float32(255)
    value = rgb.max(axis=-1)
    spread = value - rgb.min(axis=-1)
    saturation = spread / np.maximum(value, 1e-6)
    hue = _hue(rgb, value, spread)
    warm = (hue >= 347) | (hue < 12)
    coloured = (saturation >= 0.22) & (value >= 0.25)
    vivid = saturation >= 0.55
    regions = {
        "pink": (saturation >= 0.18) & (value > 0.75) & _pinkish(hue, saturation),
        "red": coloured & warm & vivid & (value >= 0.60),
        "brown": coloured
        & (hue >= 10)
        & (hue < 42)
        & (saturation > 0.35)
        & ((value < 0.66) | ((value < 0.78) & (saturation < 0.7))),
        "orange": coloured & (hue >= 16) & (hue < 42) & (saturation >= 0.72) & (value >= 0.80),
        "yellow": coloured & (hue >= 45) & (hue < 66) & (saturation > 0.4) & (value > 0.75),
        "green": coloured & (hue >= 80) & (hue < 165),
        "blue": coloured & (hue >= 188) & (hue < 252) & (saturation > 0.38),
        "purple": coloured & (hue >= 258) & (hue < 304) & (saturation > 0.34),
        "black": (value < 0.18) | ((value < 0.28) & (saturation < 0.3)),
        "white": (saturation < 0.08) & (value > 0.90),
        "gray": (saturation < 0.16) & (value > 0.32) & (value < 0.78),
    }
    named = np.full(value.shape, _NO_WORD, dtype=np.int8)
    for word, region in regions.items():
        named[region] = COLOURS.index(word)
    return named


def _pinkish(hue: NDArray[np.float32], saturation: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Between purple and red, or a pale red; a strong colour next to red has no clear word."""
    pale_red = ((hue >= 335) | (hue < 12)) & (saturation < 0.5)
    near_red = (hue >= 335) & (hue < 347) & (saturation < 0.72)
    return ((hue >= 312) & (hue < 335)) | near_red | pale_red


def dominant_colour(pixels: NDArray[np.uint8], share: float = 0.6) -> str | None:
    """Name the colour of more than `share` of the pixels, or None when no word has so many.

    Args:
        pixels: Red, green, blue in 0..255, shape (count, 3).
        share: Fraction of the pixels that the colour must pass, 0 to 1.
    """
    if len(pixels) == 0:
        return None
    named = name_pixels(pixels)
    counts = np.bincount(named[named >= 0].astype(np.int64), minlength=len(COLOURS))
    best = int(counts.argmax())
    return COLOURS[best] if counts[best] > share * len(pixels) else None


def to_lab(rgb: NDArray[np.uint8] | RGB) -> NDArray[np.float64]:
    """CIELAB (D65) of sRGB in 0..255, shape (..., 3): distances in it match what the eye calls different."""
    linear = _LINEAR[np.asarray(rgb, dtype=np.uint8)]
    xyz = linear @ _TO_XYZ.T
    curved = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = curved[..., 0], curved[..., 1], curved[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


_LEVELS = np.arange(256) / 255
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)
_TO_XYZ = np.array(
    [
        [0.4124 / 0.9505, 0.3576 / 0.9505, 0.1805 / 0.9505],
        [0.2126, 0.7152, 0.0722],
        [0.0193 / 1.089, 0.1192 / 1.089, 0.9505 / 1.089],
    ]
)


def _hue(rgb: NDArray[np.float32], value: NDArray[np.float32], spread: NDArray[np.float32]) -> NDArray[np.float32]:
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    safe = np.maximum(spread, 1e-6)
    sector = np.where(
        value == red,
        ((green - blue) / safe) % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    degrees: NDArray[np.float32] = (60 * sector).astype(np.float32)
    return degrees
