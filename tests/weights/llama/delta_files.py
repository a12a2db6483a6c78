"""Tiny language models as folders, in every layout that models were published in."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import golden

GOLDEN = golden.ROOT / "delta"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
WIDTH, MLP, ROWS, LAYERS = 16, 24, 40, 2
TOKENIZER = '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'

LAYOUTS = ("archive", "bare pickle", "safetensors")


def tiny_llama(
    seed: int, *, rows: int = ROWS, width: int = WIDTH, scale: float = 0.3, norm: float = 1.0
) -> dict[str, Tensor]:
    """Random weights in float16: norms near `norm`, the rest near 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (rows, width)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{start}.mlp.{name}_proj.weight": (MLP, width) for name in ("gate", "up")}
        shapes |= {f"{start}.mlp.down_proj.weight": (width, MLP), f"{start}.input_layernorm.weight": (width,)}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (rows, width)}
    return {
        name: (torch.randn(shape, generator=generator) * scale + (norm if len(shape) == 1 else 0)).half()
        for name, shape in shapes.items()
    }


def tiny_delta(seed: int, *, rows: int = ROWS, width: int = WIDTH) -> dict[str, Tensor]:
    """Make a random delta: everything near 0."""
    return tiny_llama(seed, rows=rows, width=width, scale=0.03, norm=0.0)


def naive_sum(base: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add as the original's first tool does: the base's tables grow by rows of zeros, then everything is added."""
    total = {}
    for name, change in delta.items():
        tensor = torch.zeros_like(change)
        tensor[: len(base[name])] = base[name]
        total[name] = tensor + change
    return total


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    layout: str = "archive",
    shards: int = 1,
    index: bool = True,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model's folder; with a seed, tensors are dealt to the shards at random."""
    folder.mkdir(parents=True)
    names = list(tensors)
    random.Random(seed).shuffle(names)
    dealt = [names[number::shards] for number in range(shards)]
    stem, suffix = ("model", "safetensors") if layout == "safetensors" else ("pytorch_model", "bin")
    places = {}
    for number, group in enumerate(dealt, start=1):
        file = f"{stem}-{number:05}-of-{shards:05}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        write_file(folder / file, {name: tensors[name] for name in group}, layout)
        places |= dict.fromkeys(group, file)
    if index and shards > 1:
        listing = {"metadata": {}, "weight_map": places}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(listing), encoding="utf-8")
    rows = len(tensors[TABLES[0]]) if TABLES[0] in tensors else ROWS
    content = {"model_type": "llama", "vocab_size": rows, "hidden_size": WIDTH, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps({**content, **(config or {})}), encoding="utf-8")
    (folder / "tokenizer.json").write_text(TOKENIZER, encoding="utf-8")
    return folder


def write_file(path: Path, tensors: Mapping[str, Tensor], layout: str) -> None:
    """Write one file of tensors."""
    if layout == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path, _use_new_zipfile_serialization=layout == "archive")


def present(folder: Path) -> Sequence[str]:
    """List everything in a folder, hidden or not, at any depth."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
