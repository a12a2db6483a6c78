"""What lies behind the things of a scene: plain colours, ramps, noise, horizons and crops of photographs."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from nano.scenes.colours import COLOURS, sample_colour

Pixels = NDArray[np.uint8]
_SHARES = {"white": 0.40, "plain": 0.22, "tint": 0.06, "gradient": 0.09, "noise": 0.08, "horizon": 0.03, "photo": 0.12}


def paint_background(rng: np.random.Generator, size: int, photos: Sequence[Image.Image] | None) -> tuple[str, Pixels]:
    """Paint a background.

    Args:
        rng: Source of every choice.
        size: Side in pixels.
        photos: Pictures to crop from; without them no background is a photograph.

    Returns:
        Its name (a colour word for a plain one, else its sort) and its pixels, shape (size, size, 3).
    """
    shares = dict(_SHARES)
    if not photos:
        shares["plain"] += shares.pop("photo") / 2
    sorts, weights = list(shares), np.array(list(shares.values()))
    sort = sorts[int(rng.choice(len(sorts), p=weights / weights.sum()))]
    if sort == "photo" and photos:
        return sort, _photo(rng, size, photos)
    if sort == "gradient":
        return sort, _ramp(rng, size)
    if sort == "noise":
        return sort, _noise(rng, size)
    if sort == "horizon":
        return sort, _horizon(rng, size)
    if sort == "tint":
        return sort, _flat(rng.uniform(205, 255, 3), size)
    word = "white" if sort == "white" else str(rng.choice([colour for colour in COLOURS if colour != "white"]))
    colour = (255, 255, 255) if word == "white" and rng.random() < 0.7 else sample_colour(word, rng)
    return word, _flat(np.array(colour), size)


def _flat(colour: NDArray[np.floating] | NDArray[np.integer], size: int) -> Pixels:
    return np.broadcast_to(colour.astype(np.uint8), (size, size, 3))


def _any_colour(rng: np.random.Generator) -> NDArray[np.float64]:
    pale = rng.random() < 0.5
    return rng.uniform(170, 255, 3) if pale else rng.uniform(0, 255, 3)


def _ramp(rng: np.random.Generator, size: int) -> Pixels:
    start, stop = _any_colour(rng), _any_colour(rng)
    steps = np.linspace(0, 1, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * steps[None, :] + np.sin(angle) * steps[:, None]
    if rng.random() < 0.25:
        along = np.hypot(steps[None, :] - rng.uniform(0.3, 0.7), steps[:, None] - rng.uniform(0.3, 0.7))
    levels = np.linspace(start, stop, 256).astype(np.uint8)
    ramp: Pixels = levels[(255 * (along - along.min()) / np.ptp(along)).astype(np.uint8)]
    return ramp


def _noise(rng: np.random.Generator, size: int) -> Pixels:
    cells = int(rng.choice([4, 8, 16, 56, size]))
    colours = 1 if rng.random() < 0.6 else 3
    strength = float(rng.uniform(8, 40) if colours == 1 else rng.uniform(8, 28))
    coarse = np.clip(_any_colour(rng) + rng.normal(0, strength, (cells, cells, colours)), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def _horizon(rng: np.random.Generator, size: int) -> Pixels:
    skies = [(150, 200, 240), (190, 225, 250), (250, 220, 190), (60, 70, 110)]
    grounds = [(120, 170, 90), (200, 180, 130), (150, 120, 90), (235, 235, 240), (90, 90, 95)]
    pixels = np.empty((size, size, 3), dtype=np.uint8)
    line = int(size * rng.uniform(0.4, 0.75))
    for rows, palette in ((slice(0, line), skies), (slice(line, size), grounds)):
        base = np.array(palette[int(rng.integers(len(palette)))]) + rng.normal(0, 8, 3)
        pixels[rows] = np.clip(base, 0, 255)
    return pixels


def _photo(rng: np.random.Generator, size: int, photos: Sequence[Image.Image]) -> Pixels:
    photo = photos[int(rng.integers(len(photos)))].convert("RGB")
    side = int(min(photo.size) * rng.uniform(0.5, 1.0))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
    crop = photo.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    radius = float(rng.choice([0, 2, 5]))
    return np.asarray(crop.filter(ImageFilter.GaussianBlur(radius)) if radius else crop)
