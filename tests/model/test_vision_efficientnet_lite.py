"""The convolutional encoder: its padding, its tokens, its words, and its real weights against another computation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from minigpt4.model import EfficientNetLiteConfig, EfficientNetLiteModel
from minigpt4.model.vision_efficientnet_lite import SamePadConv2d
from tests.model import tiny

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def encoder(**changes: Any) -> EfficientNetLiteModel:
    torch.manual_seed(0)
    return EfficientNetLiteModel(EfficientNetLiteConfig(**{**tiny.VISION["efficientnet_lite"], **changes})).eval()


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side, by TensorFlow's documented rule for "SAME"."""
    total = max(kernel - stride, 0) if side % stride == 0 else max(kernel - side % stride, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize("side", [8, 9, 15, 16])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_the_sum_over_windows_that_start_where_tensorflow_starts_them(
    side: int, kernel: int, stride: int
) -> None:
    torch.manual_seed(side)
    layer = SamePadConv2d(3, 4, kernel, stride)
    height, width = side, side + 1  # one odd, one even
    picture = torch.randn(2, 3, height, width)
    top, bottom = same_padding(height, kernel, stride)
    left, right = same_padding(width, kernel, stride)
    padded = torch.zeros(2, 3, top + height + bottom, left + width + right)
    padded[..., top : top + height, left : left + width] = picture
    out_height, out_width = math.ceil(height / stride), math.ceil(width / stride)
    expected = torch.empty(2, 4, out_height, out_width)
    for y in range(out_height):
        for x in range(out_width):
            window = padded[..., y * stride : y * stride + kernel, x * stride : x * stride + kernel]
            expected[..., y, x] = torch.einsum("bchw,ochw->bo", window, layer.weight.detach()) + layer.bias.detach()
    with torch.no_grad():
        torch.testing.assert_close(layer(picture), expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("corner", [(0, 0), (0, 3), (3, 0), (3, 3), (1, 2)])
def test_token_in_raster_order_moves_when_its_square_of_the_picture_does(corner: tuple[int, int]) -> None:
    model = encoder(
        stage_repeats=[1], stage_kernels=[1], stage_strides=[2], stage_expansions=[1], stage_channels=[8],
        feature_stages=[0], feature_scales=[1.0],
    )  # fmt: skip
    y, x = corner
    dark, lit = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    lit[..., 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 3.0
    with torch.no_grad():
        moved = (model(lit).last_hidden_state - model(dark).last_hidden_state).abs().amax(dim=-1)[0]
    assert moved.shape == (16,) and model.config.num_patches == 16
    assert int(moved.argmax()) == 4 * y + x
    # The stem's window reaches one pixel into the square's left and upper neighbours.
    assert {int(place) for place in moved.nonzero()} <= {4 * a + b for a in (y - 1, y) for b in (x - 1, x)}


def test_channels_are_the_scaled_maps_finest_first_then_colour_then_the_position() -> None:
    model = encoder()
    maps = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _module, _args, output: maps.append(output))
    with torch.no_grad():
        tokens = model(tiny.pictures(2)).last_hidden_state
    fine, coarse = maps
    assert (fine.shape, coarse.shape) == ((2, 8, 8, 8), (2, 16, 4, 4))
    assert tokens.shape == (2, 64, 8 + 16 + 64 + 8) == (2, model.config.num_patches, model.config.hidden_size)
    grid = tokens.transpose(1, 2).unflatten(2, (8, 8))
    assert torch.equal(grid[:, :8], fine)
    assert torch.equal(grid[:, 8:24], 0.5 * coarse.repeat_interleave(2, 2).repeat_interleave(2, 3))
    for y in range(8):
        for x in range(8):
            row, column = math.pi * (y + 0.5) / 8, math.pi * (x + 0.5) / 8
            angles = torch.tensor([row, 2 * row, column, 2 * column])
            code = torch.cat([angles[:2].sin(), angles[:2].cos(), angles[2:].sin(), angles[2:].cos()])
            torch.testing.assert_close(grid[0, 88:, y, x], code, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("color", "shares"),
    [
        ((0.0, 0.0, 0.0), {(0, 0, 0): 1.0}),
        ((1.0, 0.0, 0.0), {(3, 0, 0): 1.0}),
        ((1 / 3, 2 / 3, 1.0), {(1, 2, 3): 1.0}),
        ((0.5, 0.0, 1.0), {(1, 0, 3): 0.5, (2, 0, 3): 0.5}),
        ((0.25, 1.0, 0.25), {(0, 3, 0): 1 / 16, (0, 3, 1): 3 / 16, (1, 3, 0): 3 / 16, (1, 3, 1): 9 / 16}),
    ],
)
def test_a_plain_place_shares_its_colour_between_the_nearest_levels(
    color: tuple[float, float, float], shares: dict[tuple[int, int, int], float]
) -> None:
    expected = torch.zeros(4, 4, 4)
    for levels, share in shares.items():
        expected[levels] = share
    pixels = (2 * torch.tensor(color) - 1).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    with torch.no_grad():
        tokens = encoder()(pixels).last_hidden_state
    torch.testing.assert_close(tokens[0, :, 24:88], 8 * expected.flatten().expand(64, -1), rtol=0.0, atol=1e-5)


def test_colours_are_counted_where_they_are() -> None:
    pixels = torch.full((1, 3, 16, 16), -1.0)
    pixels[:, 0, 2:4, 4:6] = 1.0  # a red square over the place in row 1, column 2
    with torch.no_grad():
        tokens = encoder()(pixels).last_hidden_state[0, :, 24:88]
    red, black = 3 * 16, 0
    assert tokens[:, red].nonzero().flatten().tolist() == [8 + 2]
    assert tokens[10, red] == 8 and tokens[10, black] == 0 and tokens[9, black] == 8


def test_maps_of_the_stem_and_of_every_stage_can_be_had() -> None:
    model = encoder()
    with torch.no_grad():
        plain = model(tiny.pictures(2))
        output = model(tiny.pictures(2), output_hidden_states=True)
        assert plain.hidden_states is None
        assert [tuple(map_.shape) for map_ in output.hidden_states] == [(2, 8, 8, 8), (2, 8, 8, 8), (2, 16, 4, 4)]
        assert torch.equal(model.stages[1](output.hidden_states[1]), output.hidden_states[2])
        model.config.output_hidden_states = True
        assert len(model(tiny.pictures(2)).hidden_states) == 3
        assert model(tiny.pictures(2), output_hidden_states=False).hidden_states is None


def test_tuple_output_begins_with_the_tokens() -> None:
    model = encoder()
    with torch.no_grad():
        named, plain = model(tiny.pictures(1)), model(tiny.pictures(1), return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == 4
    assert torch.equal(plain[0], named.last_hidden_state)


def test_without_colour_bins_there_are_no_colours() -> None:
    model = encoder(color_bins=0)
    with torch.no_grad():
        tokens = model(tiny.pictures(1)).last_hidden_state
    assert tokens.shape[-1] == model.config.hidden_size == 8 + 16 + 8


def test_no_two_places_have_the_same_position_code() -> None:
    with torch.no_grad():
        code = encoder()(torch.zeros(1, 3, 16, 16)).last_hidden_state[0, :, 88:]
    distance = torch.cdist(code, code) + 9 * torch.eye(64)
    assert distance.min() > 0.1


@pytest.mark.parametrize("image_size", [16, 24, 36])
def test_number_of_tokens_is_known_before_the_first_picture(image_size: int) -> None:
    for stages in ([0, 1], [1]):
        model = encoder(image_size=image_size, feature_stages=stages, feature_scales=[1.0] * len(stages))
        with torch.no_grad():
            tokens = model(tiny.pictures(1, size=image_size)).last_hidden_state
        assert tokens.shape[1] == model.config.num_patches


def test_words_are_those_of_the_best_classes_weighted_by_probability() -> None:
    model = encoder(num_concepts=3)
    with torch.no_grad():
        seen = model(tiny.pictures(2))
        table = model.concept_embeddings.weight.view(7, 2, 32)
    assert seen.concept_embeds.shape == (2, 6, 32)
    for picture, words in zip(seen.logits, seen.concept_embeds, strict=True):
        probabilities = picture.softmax(-1)
        best = probabilities.argsort(descending=True)[:3]
        expected = torch.cat([table[place] * probabilities[place] for place in best])
        torch.testing.assert_close(words, expected, rtol=0.0, atol=1e-6)


def test_without_concepts_there_is_no_table_and_no_words() -> None:
    model = encoder(num_concepts=0)
    assert not any("concept" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        assert model(tiny.pictures(1)).concept_embeds is None
        joined = tiny.model(vision="efficientnet_lite")
        joined.model.vision_model = model
        assert joined.get_image_features(tiny.pictures(1)).pooler_output.shape == (1, tiny.NUM_IMAGE_TOKENS, 64)


def test_a_picture_is_read_alike_alone_and_among_others() -> None:
    model, pixels = encoder(), tiny.pictures(3)
    with torch.no_grad():
        together = model(pixels).last_hidden_state
        for place in range(3):
            alone = model(pixels[place : place + 1]).last_hidden_state[0]
            torch.testing.assert_close(together[place], alone, rtol=0.0, atol=1e-5)


# The real weights. The reference below knows the original's file alone: its names, batch norms that are not folded,
# and TensorFlow's padding; it shares no line with the package.

LITE0 = [  # repeats, kernel, stride
    (1, 3, 1), (2, 3, 2), (2, 5, 2), (3, 3, 2), (3, 5, 1), (4, 5, 2), (1, 3, 1),
]  # fmt: skip


def original_logits(weights: dict[str, Tensor], picture: Tensor) -> Tensor:
    """EfficientNet-Lite0, straight from the tensors of `efficientnet-lite0-*.pth`."""

    def convolve(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        top, bottom = same_padding(x.shape[2], kernel.shape[2], stride)
        left, right = same_padding(x.shape[3], kernel.shape[3], stride)
        return functional.conv2d(functional.pad(x, (left, right, top, bottom)), kernel, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=1e-3)

    x = functional.relu6(norm(convolve(picture, "_conv_stem", 2), "_bn0"))
    block = 0
    for repeats, _, first_stride in LITE0:
        for repeat in range(repeats):
            name, stride, start = f"_blocks.{block}", first_stride if repeat == 0 else 1, x
            if f"{name}._expand_conv.weight" in weights:
                x = functional.relu6(norm(convolve(x, f"{name}._expand_conv"), f"{name}._bn0"))
            x = convolve(x, f"{name}._depthwise_conv", stride, groups=x.shape[1])
            x = norm(convolve(functional.relu6(norm(x, f"{name}._bn1")), f"{name}._project_conv"), f"{name}._bn2")
            x = x + start if repeat else x
            block += 1
    x = functional.relu6(norm(convolve(x, "_conv_head"), "_bn1")).mean(dim=(2, 3))
    return functional.linear(x, weights["_fc.weight"], weights["_fc.bias"])


@pytest.mark.network
@pytest.mark.reference
def test_real_weights_give_the_logits_of_the_unfolded_network_and_see_a_flower() -> None:
    from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
    from minigpt4.weights.files.torch_files import read_torch_file
    from minigpt4.weights.nano import class_words, convert_vision_weights
    from minigpt4.weights.parts import EFFICIENTNET_LITE0, fetch

    original = read_torch_file(fetch(EFFICIENTNET_LITE0))
    model = EfficientNetLiteModel(EfficientNetLiteConfig(num_concepts=0)).eval()
    model.load_state_dict(convert_vision_weights(original))
    processor = MiniGPT4ImageProcessor(image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3)
    names = ["sunflower", "pineapple", "motorbike"]
    pixels = processor([EXAMPLES / f"{name}.jpg" for name in names], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        actual = model(pixels).logits
        expected = original_logits(original, pixels)
    assert expected.abs().max() > 5
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=1e-4)
    best = {name: class_words()[int(place)] for name, place in zip(names, actual.argmax(-1), strict=True)}
    assert best["sunflower"] == "daisy"
    assert best["pineapple"] == "pineapple"
