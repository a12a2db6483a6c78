import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.processing.augmentation import crop_box, random_resized_crop
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.processing.pictures import open_image
from tests import golden


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.reference
@pytest.mark.parametrize("index", range(len(golden.tensors("golden/train_image_processor.safetensors"))))
def test_same_seed_gives_the_crop_and_the_numbers_of_the_original(index: int) -> None:
    recorded = golden.content("golden/train_image_processor.json")
    case = recorded["cases"][index]
    image = open_image(golden.ROOT / "inputs" / f"img{case['image']}.png")
    normalise = MiniGPT4ImageProcessor(do_resize=False)

    box = crop_box(image.width, image.height, generator(case["torch_manual_seed"]))
    crop = random_resized_crop(image, recorded["image_size"], generator(case["torch_manual_seed"]))

    assert list(box) == case["crop_ijhw"]
    expected = golden.tensors("golden/train_image_processor.safetensors")[f"out_{index}"]
    np.testing.assert_array_equal(normalise(crop)["pixel_values"][0], expected)


def test_crops_keep_their_area_and_aspect_ratio_and_stay_inside() -> None:
    source = generator(0)

    boxes = np.asarray([crop_box(640, 480, source) for _ in range(500)])

    top, left, height, width = boxes.T
    area, aspect = height * width / (640 * 480), width / height
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 480).all()
    assert (left + width <= 640).all()
    # Sides are rounded to whole pixels: half a pixel of about 340 is 0.15 percent of a side, 0.3 of an area.
    assert 0.498 < area.min() < 0.52
    assert 0.9 < area.max() < 1.003
    assert 0.748 < aspect.min() < 0.8
    assert 1.25 < aspect.max() < 1.336


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(10, 1000, (493, 0, 13, 10)), (1000, 10, (0, 493, 10, 13)), (1, 1, (0, 0, 1, 1))],
    ids=["tall", "wide", "dot"],
)
def test_picture_without_a_permitted_crop_gives_its_middle(
    width: int, height: int, expected: tuple[int, int, int, int]
) -> None:
    assert crop_box(width, height, generator(0)) == expected


def test_crop_depends_on_the_generator_alone() -> None:
    image = Image.fromarray(np.arange(50 * 70 * 3, dtype=np.uint8).reshape(50, 70, 3))
    torch.manual_seed(1)
    first = random_resized_crop(image, 32, generator(7))
    torch.manual_seed(2)
    second = random_resized_crop(image, 32, generator(7))

    assert first.size == (32, 32)
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != random_resized_crop(image, 32, generator(8)).tobytes()
