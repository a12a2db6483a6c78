import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.errors import ImageError
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from tests import golden
from tests.processing.picture_files import exif, png, saved

GRADIENT = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)

ODD_SIZES = np.load(golden.ROOT / "golden/eval_image_processor_odd_sizes.npz")


@pytest.fixture
def processor() -> MiniGPT4ImageProcessor:
    return MiniGPT4ImageProcessor()


def plain_transform(image: Image.Image, side: int = 224) -> np.ndarray:
    """The original's evaluation transform, written out: resize, to [0, 1], normalise; float32 all the way."""
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(255)
    mean = np.asarray([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
    std = np.asarray([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
    return ((pixels - mean) / std).transpose(2, 0, 1)


@pytest.mark.reference
@pytest.mark.parametrize("index", range(len(ODD_SIZES.files) // 2))
def test_odd_sizes_equal_the_original_bit_for_bit(index: int, processor: MiniGPT4ImageProcessor) -> None:
    image = Image.fromarray(ODD_SIZES[f"rgb_{index}"])

    pixel_values = processor(image, size={"height": 56, "width": 56})["pixel_values"][0]

    assert pixel_values.dtype == np.float32
    np.testing.assert_array_equal(pixel_values, ODD_SIZES[f"eval_{index}"])


@pytest.mark.reference
def test_files_equal_the_original_bit_for_bit(processor: MiniGPT4ImageProcessor) -> None:
    paths = [str(golden.ROOT / "inputs" / f"img{index}.png") for index in range(3)]

    full = processor(paths, return_tensors="np")["pixel_values"]
    small = processor(paths, return_tensors="np", size={"height": 56, "width": 56})["pixel_values"]

    np.testing.assert_array_equal(full, np.load(golden.ROOT / "inputs" / "pixel_values_224.npz")["pixel_values"])
    np.testing.assert_array_equal(small, golden.tensors("inputs/pixel_values.safetensors")["pixel_values"].numpy())


def test_every_sample_value_is_normalised_as_in_the_original(processor: MiniGPT4ImageProcessor) -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))

    pixel_values = processor(ramp, do_resize=False)["pixel_values"][0]

    np.testing.assert_array_equal(pixel_values, plain_transform(ramp, side=16))


@pytest.mark.parametrize("side", [224, 448])
def test_size_is_configurable_and_the_aspect_ratio_is_not_kept(side: int) -> None:
    image = Image.fromarray(GRADIENT)

    batch = MiniGPT4ImageProcessor(size={"height": side, "width": side})(image, return_tensors="pt")

    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].shape == (1, 3, side, side)
    np.testing.assert_array_equal(batch["pixel_values"][0].numpy(), plain_transform(image, side))


def test_nano_uses_the_same_class_with_numbers_of_its_own() -> None:
    lite = MiniGPT4ImageProcessor(image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3)
    extremes = Image.fromarray(np.asarray([[[0, 127, 255]]], dtype=np.uint8))

    pixel_values = lite(extremes)["pixel_values"][0]

    np.testing.assert_allclose(pixel_values[:, 0, 0], [-127 / 128, 0, 1], atol=1e-6)


def test_options_survive_saving(tmp_path: Path) -> None:
    original = MiniGPT4ImageProcessor(
        size={"height": 448, "width": 448}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2
    )
    image = Image.fromarray(GRADIENT)

    original.save_pretrained(tmp_path)
    loaded = MiniGPT4ImageProcessor.from_pretrained(tmp_path)

    assert loaded.to_dict() == original.to_dict()
    np.testing.assert_array_equal(loaded(image)["pixel_values"][0], original(image)["pixel_values"][0])
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "MiniGPT4ImageProcessor"


def test_size_of_the_shortest_edge_keeps_the_aspect_ratio(processor: MiniGPT4ImageProcessor) -> None:
    image = Image.fromarray(GRADIENT)

    batch = processor(image, size={"shortest_edge": 20}, return_tensors="np")

    assert batch["pixel_values"].shape == (1, 3, 20, 30)


def test_instances_do_not_share_their_sizes() -> None:
    MiniGPT4ImageProcessor().size["height"] = 1

    assert dict(MiniGPT4ImageProcessor().size) == {"height": 224, "width": 224}


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_modes_that_convert_well_come_out_as_in_the_original(mode: str, processor: MiniGPT4ImageProcessor) -> None:
    image = Image.fromarray(GRADIENT).convert(mode)

    np.testing.assert_array_equal(processor(image)["pixel_values"][0], plain_transform(image.convert("RGB")))


WHITE = Image.new("RGB", (1, 1), "white")
MID_GREY = Image.new("RGB", (1, 1), (128, 128, 128))
DIFFERENT_FROM_THE_ORIGINAL = {
    "rgba-hidden-colour": (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), WHITE),
    "grey-hidden": (Image.new("LA", (1, 1), (0, 0)), WHITE),
    "palette-hidden": (Image.open(io.BytesIO(saved(Image.new("P", (1, 1), 0), "GIF", transparency=0))), WHITE),
    "grey-16-bit": (Image.open(io.BytesIO(png(1, 1, 16, 0, b"\0\x80\0"))), MID_GREY),
}


@pytest.mark.parametrize(
    ("image", "seen"), DIFFERENT_FROM_THE_ORIGINAL.values(), ids=DIFFERENT_FROM_THE_ORIGINAL.keys()
)
def test_modes_that_the_original_loses_follow_the_opener(
    image: Image.Image, seen: Image.Image, processor: MiniGPT4ImageProcessor
) -> None:
    pixel_values = processor(image)["pixel_values"][0]

    np.testing.assert_array_equal(pixel_values, plain_transform(seen))
    assert not np.array_equal(pixel_values, plain_transform(image.convert("RGB")))


SIDEWAYS = saved(Image.fromarray(GRADIENT).transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(6))


@pytest.mark.parametrize("picture", [SIDEWAYS, Image.open(io.BytesIO(SIDEWAYS))], ids=["file", "pillow"])
def test_orientation_is_applied(picture: bytes | Image.Image, processor: MiniGPT4ImageProcessor) -> None:
    pixel_values = processor(picture)["pixel_values"][0]

    np.testing.assert_array_equal(pixel_values, plain_transform(Image.fromarray(GRADIENT)))


GREY = GRADIENT[:, :, 0]
OPAQUE = np.dstack([GRADIENT, np.full((40, 60), 255, np.uint8)])
ARRAYS = {
    "channels-last": (GRADIENT, GRADIENT),
    "channels-first": (GRADIENT.transpose(2, 0, 1), GRADIENT),
    "tensor": (torch.from_numpy(GRADIENT), GRADIENT),
    "grey": (GREY, np.dstack([GREY] * 3)),
    "grey-with-axis": (GREY[None], np.dstack([GREY] * 3)),
    "opaque": (OPAQUE, GRADIENT),
    "opaque-first": (OPAQUE.transpose(2, 0, 1), GRADIENT),
    "one-row": (GRADIENT[:1], GRADIENT[:1]),
    "four-rows": (GRADIENT[:4], GRADIENT[:4]),
}


@pytest.mark.parametrize(("array", "meant"), ARRAYS.values(), ids=ARRAYS.keys())
def test_arrays_are_understood_by_their_shape(
    array: np.ndarray, meant: np.ndarray, processor: MiniGPT4ImageProcessor
) -> None:
    pixel_values = processor(array)["pixel_values"][0]

    np.testing.assert_array_equal(pixel_values, plain_transform(Image.fromarray(meant)))


def test_transparent_array_is_composed_on_white(processor: MiniGPT4ImageProcessor) -> None:
    clear = np.zeros((2, 2, 4), np.uint8)

    np.testing.assert_array_equal(processor(clear)["pixel_values"][0], plain_transform(WHITE))


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.zeros((5, 6, 7), np.uint8), r"shape \(5, 6, 7\) is not a picture, expected 1, 3 or 4 channels"),
        (np.zeros((1, 6, 7), np.float32), "1 channels and type float32 has no defined colours"),
    ],
)
def test_array_that_is_no_picture_is_refused(
    array: np.ndarray, complaint: str, processor: MiniGPT4ImageProcessor
) -> None:
    with pytest.raises(ImageError, match=complaint):
        processor(array)


def test_channels_stay_without_conversion(processor: MiniGPT4ImageProcessor) -> None:
    image = Image.fromarray(OPAQUE)

    batch = processor(image, do_convert_rgb=False, do_resize=False, do_rescale=False, do_normalize=False)

    np.testing.assert_array_equal(batch["pixel_values"][0], OPAQUE.transpose(2, 0, 1))


def test_batch_equals_pictures_one_by_one(processor: MiniGPT4ImageProcessor) -> None:
    wide, tall = Image.fromarray(GRADIENT), Image.fromarray(GRADIENT.transpose(1, 0, 2))

    batch = processor([wide, tall], return_tensors="np")["pixel_values"]

    np.testing.assert_array_equal(batch, np.stack([plain_transform(wide), plain_transform(tall)]))


def test_addresses_are_not_fetched(processor: MiniGPT4ImageProcessor) -> None:
    with pytest.raises(ImageError, match="is a remote address"):
        processor([Image.fromarray(GRADIENT), "http://127.0.0.1:9/cat.jpg"])


def test_oversized_picture_is_refused_by_the_processor_too(processor: MiniGPT4ImageProcessor) -> None:
    with pytest.raises(ImageError, match="has 20001 x 1 pixels"):
        processor(Image.new("L", (20_001, 1)))


@pytest.mark.parametrize("picture", [None, 7, {"a": 1}])
def test_object_that_is_no_picture_is_refused(picture: object, processor: MiniGPT4ImageProcessor) -> None:
    with pytest.raises(ImageError, match="is not a picture"):
        processor([picture])
