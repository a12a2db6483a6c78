"""The original's files by names, shapes and types, written down from its own code; no importer was asked.

`PUBLISHED` are the sizes that were released, `SMALL` a few numbers of the same make-up. `Listed` stands for a file of
any size, `write` makes small real ones.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.processing.tiny_tokenizers import sentencepiece_model

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """What the original hard-codes or reads from configurations."""

    vision_width: int = 1408
    blocks_in_file: int = 40
    vision_mlp: int = 6144
    vision_heads: int = 16
    patch: int = 14
    grid: int = 16
    qformer_width: int = 768
    qformer_layers: int = 12
    qformer_mlp: int = 3072
    qformer_heads: int = 12
    queries: int = 32
    text_width: int = 4096
    text_layers: int = 32
    text_mlp: int = 11008
    text_heads: int = 32
    vocabulary: int = 32000


PUBLISHED = Sizes()
PUBLISHED_13B = replace(PUBLISHED, text_width=5120, text_layers=40, text_mlp=13824, text_heads=40)
SMALL = Sizes(
    vision_width=24, blocks_in_file=4, vision_mlp=40, vision_heads=2, patch=4, grid=3, qformer_width=16,
    qformer_layers=4, qformer_mlp=20, qformer_heads=2, queries=3, text_width=12, text_layers=2, text_mlp=20,
    text_heads=2, vocabulary=380,
)  # fmt: skip


def vision(sizes: Sizes, prefix: str = "", head: bool = True) -> Shapes:
    """`eva_vit_g.pth`."""
    width, mlp = sizes.vision_width, sizes.vision_mlp
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + sizes.grid**2, width),
        "patch_embed.proj.weight": (width, 3, sizes.patch, sizes.patch),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(sizes.blocks_in_file):
        one: Shapes = {"attn.q_bias": (width,), "attn.v_bias": (width,), "attn.qkv.weight": (3 * width, width)}
        one |= _norm("norm1", width) | _norm("norm2", width) | _linear("attn.proj", width, width)
        one |= _linear("mlp.fc1", mlp, width) | _linear("mlp.fc2", width, mlp)
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in one.items()}
    if head:
        shapes |= _norm("norm", width) | _linear("head", 1000, width)
    return {prefix + name: shape for name, shape in shapes.items()}


def qformer(sizes: Sizes, text_side: bool = False) -> Shapes:
    """`blip2_pretrained_flant5xxl.pth`, or one of its forerunners that still reads text."""
    width = sizes.qformer_width
    shapes: Shapes = {"query_tokens": (1, sizes.queries, width), **_norm("ln_vision", sizes.vision_width)}
    shapes |= {"Qformer.bert.embeddings.position_ids": (1, 512), **_norm("Qformer.bert.embeddings.LayerNorm", width)}
    for layer in range(sizes.qformer_layers):
        here = f"Qformer.bert.encoder.layer.{layer}"
        for part, reads in (("attention", width), ("crossattention", sizes.vision_width)):
            if part == "crossattention" and layer % 2:
                continue
            shapes |= _linear(f"{here}.{part}.self.query", width, width)
            shapes |= _linear(f"{here}.{part}.self.key", width, reads)
            shapes |= _linear(f"{here}.{part}.self.value", width, reads)
            shapes |= _linear(f"{here}.{part}.output.dense", width, width)
            shapes |= _norm(f"{here}.{part}.output.LayerNorm", width)
        for side in ("_query", "") if text_side else ("_query",):
            shapes |= _linear(f"{here}.intermediate{side}.dense", sizes.qformer_mlp, width)
            shapes |= _linear(f"{here}.output{side}.dense", width, sizes.qformer_mlp)
            shapes |= _norm(f"{here}.output{side}.LayerNorm", width)
    if text_side:
        shapes |= {
            "Qformer.bert.embeddings.word_embeddings.weight": (30523, width),
            "Qformer.bert.embeddings.position_embeddings.weight": (512, width),
            "Qformer.cls.predictions.bias": (30523,),
            **_linear("vision_proj", 256, width),
            **_linear("text_proj", 256, width),
            **_linear("itm_head", 2, width),
            "temp": (),
        }
    return shapes | _linear("t5_proj", 4096, width)


def llama(sizes: Sizes, buffers: bool = True) -> Shapes:
    """A LLaMA or Vicuna folder."""
    width, mlp = sizes.text_width, sizes.text_mlp
    shapes: Shapes = {
        "model.embed_tokens.weight": (sizes.vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (sizes.vocabulary, width),
    }
    for layer in range(sizes.text_layers):
        here = f"model.layers.{layer}"
        shapes |= {f"{here}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{here}.mlp.{part}_proj.weight": (mlp, width) for part in ("gate", "up")}
        shapes |= {f"{here}.mlp.down_proj.weight": (width, mlp)}
        shapes |= {f"{here}.{part}.weight": (width,) for part in ("input_layernorm", "post_attention_layernorm")}
        if buffers:
            shapes[f"{here}.self_attn.rotary_emb.inv_freq"] = (width // sizes.text_heads // 2,)
    return shapes


def checkpoint(sizes: Sizes, with_qformer: bool = True) -> Shapes:
    """`pretrained_minigpt4*.pth`: what was trained, and every buffer of the model."""
    reads = sizes.qformer_width if with_qformer else 4 * sizes.vision_width
    buffers = {
        f"llama_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq": (sizes.text_width // sizes.text_heads // 2,)
        for layer in range(sizes.text_layers)
    }
    positions: Shapes = {"Qformer.bert.embeddings.position_ids": (1, 512)} if with_qformer else {}
    return {**positions, **buffers, **_linear("llama_proj", sizes.text_width, reads)}


def second_version(sizes: Sizes, rank: int = 64) -> Shapes:
    """`minigptv2_checkpoint.pth`, as the LoRA library of that time named its parts."""
    shapes = _linear("llama_proj", sizes.text_width, 4 * sizes.vision_width)
    for layer in range(sizes.text_layers):
        here = f"llama_model.base_model.model.model.layers.{layer}.self_attn"
        for part in ("q_proj", "v_proj"):
            shapes[f"{here}.{part}.lora_A.weight"] = (rank, sizes.text_width)
            shapes[f"{here}.{part}.lora_B.weight"] = (sizes.text_width, rank)
        shapes[f"{here}.rotary_emb.inv_freq"] = (64,)
    return shapes


def text_config(sizes: Sizes) -> dict[str, Any]:
    """The language model's `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": sizes.text_width,
        "initializer_range": 0.02,
        "intermediate_size": sizes.text_mlp,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": sizes.text_heads,
        "num_hidden_layers": sizes.text_layers,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.28.0",
        "vocab_size": sizes.vocabulary,
    }


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers there are in tensors of these shapes."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


class Listed:
    """A file of which names and shapes are known, and nothing can be read."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def names(self) -> Sequence[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.int64 if name.endswith("position_ids") else torch.float16

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read, and only headers may be")


def drawn(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors of these shapes; a norm's weights lie round 1, as in a trained model, positions are whole."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: (torch.randn(shape, generator=generator) * 0.2).to(dtype) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[-1])[None]
        elif name.endswith("norm.weight"):
            tensors[name] += 1
    return tensors


def write(folder: Path, sizes: Sizes = SMALL, *, with_qformer: bool = True, seed: int = 0) -> dict[str, Path]:
    """Write a small model's files, each as the original and its tools wrote it."""
    files = {
        "vision": folder / "eva_vit_g.pth",
        "qformer": folder / "blip2_pretrained_flant5xxl.pth",
        "projection": folder / "pretrained_minigpt4.pth",
        "language_model": folder / "vicuna",
    }
    torch.save(drawn(vision(sizes), seed, torch.float16), files["vision"])
    torch.save({"model": drawn(qformer(sizes), seed + 1)}, files["qformer"])
    trained = {"model": drawn(checkpoint(sizes, with_qformer), seed + 2), "optimizer": {}, "config": {}, "epoch": 4}
    torch.save({**trained, "scaler": None}, files["projection"])
    files["language_model"].mkdir()
    tensors = drawn(llama(sizes), seed + 3, torch.float16)
    half = len(tensors) // 2
    index: dict[str, str] = {}
    for number, names in enumerate((list(tensors)[:half], list(tensors)[half:]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, files["language_model"] / file)
        index |= dict.fromkeys(names, file)
    listing = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (files["language_model"] / "pytorch_model.bin.index.json").write_text(listing, encoding="utf-8")
    (files["language_model"] / "config.json").write_text(json.dumps(text_config(sizes)), encoding="utf-8")
    write_tokenizer(files["language_model"])
    return files


def write_tokenizer(folder: Path, *, tokenizer_class: str = "LlamaTokenizer") -> None:
    """Write the three files of a Vicuna's tokenizer."""
    tokens = {name: {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
              for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))}  # fmt: skip
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens), encoding="utf-8")
    config = {"tokenizer_class": tokenizer_class, "add_bos_token": True, "add_eos_token": False, "pad_token": None}
    typed = {name: {"__type": "AddedToken", **token} for name, token in tokens.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | typed), encoding="utf-8")


def _linear(name: str, makes: int, reads: int) -> Shapes:
    return {f"{name}.weight": (makes, reads), f"{name}.bias": (makes,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
