"""Random crops for training, as the original makes them: the same seed gives the same crop and the same pixels.

Follows `RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=bicubic)` of torchvision, on Pillow and without
torchvision: the same draws in the same order, so that a run can be compared with one of the original.

This module does not open, normalise or shuffle pictures.
"""

import math

import torch
from PIL import Image

AREA_RANGE = (0.5, 1.0)
"""Smallest and largest part of the area that a crop keeps."""

ASPECT_RANGE = (3 / 4, 4 / 3)
"""Smallest and largest width of a crop, as a multiple of its height."""

_ATTEMPTS = 10


def random_resized_crop(image: Image.Image, size: int, generator: torch.Generator) -> Image.Image:
    """Cut a random part out of a picture and squash it to a square.

    Args:
        image: RGB, as `open_image` gives it.
        size: Side of the result, in pixels.
        generator: Where the random numbers come from; advanced by 4 draws an attempt.

    Returns:
        `size` x `size` pixels, bicubic.

    Source: torchvision's `RandomResizedCrop`, with the scale that the original passes (`blip2_image_train`).
    """
    top, left, height, width = crop_box(image.width, image.height, generator)
    crop = image.crop((left, top, left + width, top + height))
    return crop.resize((size, size), Image.Resampling.BICUBIC)


def crop_box(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Draw a part of a picture of that size.

    Args:
        width: Of the picture, in pixels.
        height: The same.
        generator: Where the random numbers come from.

    Returns:
        Top, left, height and width of the part, in pixels. Where ten draws leave the picture, the largest part in
        the middle whose aspect ratio is permitted.
    """
    log_aspect = torch.log(torch.tensor(ASPECT_RANGE)).tolist()
    for _ in range(_ATTEMPTS):
        area = width * height * torch.empty(1).uniform_(*AREA_RANGE, generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(*log_aspect, generator=generator)).item()
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = torch.randint(0, height - crop_height + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - crop_width + 1, (1,), generator=generator).item()
            return int(top), int(left), crop_height, crop_width
    narrowest, widest = ASPECT_RANGE
    crop_width = min(width, round(height * widest))
    crop_height = min(height, round(width / narrowest))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
