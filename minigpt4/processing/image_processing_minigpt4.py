"""Pictures to the numbers a vision encoder reads: a transformers image processor on Pillow, without torchvision.

The defaults are MiniGPT-4's evaluation transform: squashed to 224 x 224 (the aspect ratio is not kept), bicubic, CLIP's
mean and standard deviation. For RGB pictures every number equals the original's bit for bit. Other modes differ on
purpose where the original's plain `convert("RGB")` loses the picture: transparency is composed on white (there: the
hidden colour shows), 16-bit grey is scaled (there: clipped to white), and the Exif orientation is applied (there:
ignored). Grey, 1-bit, palette and CMYK pictures come out as there.

This module knows no model, and no text. How pictures are opened is the business of `pictures`.
"""

from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
)
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from minigpt4.errors import ImageError
from minigpt4.processing.pictures import PictureSource, open_image


class MiniGPT4ImageProcessor(PilBackend):
    """Turn pictures into normalised pixel values.

    Options are the library's: `size` (`{"height": 448, "width": 448}`), `resample`, `image_mean`, `image_std`,
    `rescale_factor`, `do_resize`, `do_rescale`, `do_normalize`, `do_convert_rgb`; each can be given here, in the
    model folder or for one call.

    Calling it returns `pixel_values`: float32, `(pictures, 3, height, width)`. A picture is anything `open_image`
    takes, or an array or tensor of whole numbers from 0 to 255: `(height, width)`, or with 1, 3 or 4 channels first
    or last. Addresses are not fetched.

    Raises:
        ImageError: When called, for a picture that cannot be opened, exceeds a limit, or is an array of no
            picture's shape.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012  (the library copies it for each instance)
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def fetch_images(self, image_url_or_urls: object) -> object:
        """Open what is not pixels yet, through the guard; the library's own would fetch addresses.

        Args:
            image_url_or_urls: A picture, or pictures in lists; the library's name for it.

        Returns:
            The same structure, with Pillow images, arrays and tensors only.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(picture) for picture in image_url_or_urls]
        if isinstance(image_url_or_urls, (np.ndarray, torch.Tensor)):
            # The library's next step knows single pictures of three axes only.
            return image_url_or_urls[None] if image_url_or_urls.ndim == 2 else image_url_or_urls
        if isinstance(image_url_or_urls, Image.Image):
            return image_url_or_urls
        return open_image(cast(PictureSource, image_url_or_urls))

    def process_image(
        self,
        image: object,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Bring one picture into the form that is resized and normalised.

        Args:
            image: A Pillow image, an array or a tensor.
            do_convert_rgb: Whether to bring it into RGB; without, channels stay as they are.
            input_data_format: Whether an array's channels come first or last; told from its shape where not given.
            **kwargs: Options of the later steps; of these, `do_resize`, `size` and `resample` matter here.

        Returns:
            `(channels, height, width)`; from a Pillow image 8-bit and perhaps resized, from an array of its type.
        """
        if isinstance(image, Image.Image):
            if not do_convert_rgb:
                return super().process_image(image, do_convert_rgb=False)
            image = open_image(image)
            size, resample = kwargs.get("size"), kwargs.get("resample")
            if kwargs.get("do_resize") and size and size.height and size.width and isinstance(resample, int):
                # While it is a Pillow image: a large array would be copied three times on its way to one and back.
                # The library's own resize then finds the size it wants and changes nothing.
                image = image.resize((size.width, size.height), resample)
            return np.moveaxis(np.asarray(image), -1, 0)
        array = np.asarray(image)
        if array.ndim == 3 and input_data_format is None:
            input_data_format = _channels_axis(array)
        array = super().process_image(array, do_convert_rgb=False, input_data_format=input_data_format)
        if do_convert_rgb and len(array) != 3:
            return self.process_image(_pillow_image(array), do_convert_rgb=True)
        return array


def _channels_axis(array: np.ndarray) -> ChannelDimension:
    """Tell where the channels are; three is the likeliest number of them, so thin RGB pictures are understood."""
    for channels in (3, 4, 1):
        if channels in (array.shape[0], array.shape[-1]):
            return infer_channel_dimension_format(array, num_channels=channels)
    raise ImageError(
        f"an array of shape {array.shape} is not a picture, expected 1, 3 or 4 channels first or last",
        "give a Pillow image, or an array such as (height, width, 3)",
    )


def _pillow_image(array: np.ndarray) -> Image.Image:
    """Give grey `(1, height, width)` or RGBA `(4, height, width)` the meaning that Pillow's modes have."""
    if array.dtype != np.uint8:
        raise ImageError(
            f"an array of {len(array)} channels and type {array.dtype} has no defined colours, expected uint8",
            "give uint8, or three channels",
        )
    return Image.fromarray(array[0] if len(array) == 1 else np.moveaxis(array, 0, -1))
