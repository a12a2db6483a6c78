"""Files of other sizes, depths, number types and layouts than the published ones give the original's numbers.

The numbers are those of a plain forward pass that reads the same files with no class of the package. Image embeddings
and logits lie within 1e-5 of the largest value of their tensor (reached: 3e-6).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minigpt4
from minigpt4.weights.original.importing import import_original
from minigpt4.weights.original.names import OriginalFiles
from tests.weights.original.original_files import SMALL, Sizes, write
from tests.weights.original.plain_forward import image_embeddings, language_logits, vision_tokens

RELATIVE = 1e-5


def tensors(path: Path) -> dict[str, Tensor]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    held: dict[str, Tensor] = content.get("model", content)
    return held


def language_tensors(folder: Path) -> dict[str, Tensor]:
    """The language model's tensors, whatever its files."""
    held = {name: tensor for path in folder.glob("*.bin") for name, tensor in tensors(path).items()}
    return held | {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def as_float32(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in held.items()}


def as_type(files: dict[str, Path], dtype: torch.dtype) -> None:
    """Write every file's numbers in another type."""
    paths = [files["vision"], files["qformer"], files["projection"], *files["language_model"].glob("*.bin")]
    for path in paths:
        changed = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors(path).items()}
        torch.save({"model": changed} if path in (files["qformer"], files["projection"]) else changed, path)


def cross_attention_every(files: dict[str, Path], every: int) -> None:
    """Leave the Q-Former's cross attention in every so many layers only."""
    kept = {
        name: tensor
        for name, tensor in tensors(files["qformer"]).items()
        if "crossattention" not in name or int(name.split(".")[4]) % every == 0
    }
    torch.save({"model": kept}, files["qformer"])


def in_safetensors(folder: Path, shards: int) -> None:
    """Write the language model's files anew, dealt to so many, with an index where there are several."""
    held = language_tensors(folder)
    places: dict[str, str] = {}
    for path in [*folder.glob("*.bin"), *folder.glob("*.index.json")]:
        path.unlink()
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: held[name].clone() for name in list(held)[number::shards]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    if shards > 1:
        listing = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(listing, encoding="utf-8")


def in_one_bin(folder: Path) -> None:
    held = language_tensors(folder)
    for path in [*folder.glob("*.bin"), *folder.glob("*.index.json")]:
        path.unlink()
    torch.save(held, folder / "pytorch_model.bin")


def other_epsilon(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"rms_norm_eps": 1e-5}), encoding="utf-8")


def as_it_is(files: dict[str, Path]) -> None:
    """No change."""


VARIATIONS: dict[str, tuple[Sizes, Callable[[dict[str, Path]], None]]] = {
    "wide": (
        replace(
            SMALL, vision_width=88, vision_heads=1, qformer_width=64, qformer_heads=4, text_width=128, text_heads=4
        ),
        as_it_is,
    ),
    "deep": (replace(SMALL, blocks_in_file=12, qformer_layers=12, text_layers=11), as_it_is),
    "shallow": (replace(SMALL, blocks_in_file=2, qformer_layers=1, text_layers=1, queries=1), as_it_is),
    "an odd number of Q-Former layers": (replace(SMALL, qformer_layers=5, queries=32), as_it_is),
    "cross attention every fourth layer": (
        replace(SMALL, qformer_layers=7),
        lambda files: cross_attention_every(files, 4),
    ),
    "one patch": (replace(SMALL, grid=1, patch=14), as_it_is),
    "many patches": (replace(SMALL, grid=32, patch=2), as_it_is),
    "positions of more patches": (SMALL, as_it_is),
    "positions of fewer patches": (SMALL, as_it_is),
    "more rows than words": (replace(SMALL, vocabulary=512), as_it_is),
    "bfloat16": (SMALL, lambda files: as_type(files, torch.bfloat16)),
    "float32": (SMALL, lambda files: as_type(files, torch.float32)),
    "float16": (SMALL, lambda files: as_type(files, torch.float16)),
    "one safetensors file": (SMALL, lambda files: in_safetensors(files["language_model"], 1)),
    "three safetensors files": (SMALL, lambda files: in_safetensors(files["language_model"], 3)),
    "one .bin file": (SMALL, lambda files: in_one_bin(files["language_model"])),
    "another epsilon": (SMALL, lambda files: other_epsilon(files["language_model"])),
}
GRIDS = {"positions of more patches": 5, "positions of fewer patches": 2}  # that pictures have, where positions differ


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= RELATIVE * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", VARIATIONS)
def test_other_files_give_the_numbers_of_a_plain_forward_pass(name: str, tmp_path: Path) -> None:
    sizes, change = VARIATIONS[name]
    files = write(tmp_path, sizes)
    change(files)
    side = GRIDS.get(name, sizes.grid) * sizes.patch
    settings = [
        f"vision_config.num_attention_heads={sizes.vision_heads}",
        f"qformer_config.num_attention_heads={sizes.qformer_heads}",
        f"vision_config.image_size={side}",
    ]
    import_original(tmp_path / "model", OriginalFiles(**files), overrides=settings)
    model, processor = minigpt4.load(tmp_path / "model", device="cpu")

    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))
    tokens = vision_tokens(as_float32(tensors(files["vision"])), pixels, sizes.vision_heads, sizes.blocks_in_file - 1)
    rest = as_float32({**tensors(files["qformer"]), **tensors(files["projection"])})
    expected = image_embeddings(rest, tokens, sizes.qformer_heads, sizes.qformer_layers)
    assert_close(model.model.get_image_features(pixels).pooler_output, expected)

    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    ids = torch.tensor([processor.encode(question).input_ids])
    places = ids == model.config.image_token_id
    own = as_float32(language_tensors(files["language_model"]))
    epsilon = json.loads((files["language_model"] / "config.json").read_text(encoding="utf-8"))["rms_norm_eps"]
    embeds = own["model.embed_tokens.weight"][ids]
    embeds[places] = expected[0]
    logits = language_logits(own, embeds, sizes.text_heads, sizes.text_layers, epsilon)
    assert_close(model(input_ids=ids, pixel_values=pixels[:1]).logits, logits)
