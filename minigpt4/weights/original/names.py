"""The original's names of files and tensors, and this package's names of the same tensors, both ways.

Four kinds of names: the vision encoder's file (`eva_vit_g.pth`), the state dict of a whole model or of part of one
(`blip2_pretrained_flant5xxl.pth`, `pretrained_minigpt4*.pth`), a LLaMA folder, and a BLIP-2 folder of a hub. Strings
only: no file is opened and no tensor is known.

The original keeps a query bias and a value bias and builds the fused bias with zeros in its middle third; here the
fused bias is one tensor, so a name here can stand for two names there.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import NamedTuple

VISION_FILE = "eva_vit_g.pth"
QFORMER_FILE = "blip2_pretrained_flant5xxl.pth"
CHECKPOINT_FILE = "pretrained_minigpt4.pth"
NUM_BLOCKS_MARK = "minigpt4_num_blocks"
"""An extra tensor in a vision file that this package wrote: how many blocks the model uses; the original skips it."""


class Kind(Enum):
    """Kind of a file or folder, told from the names in it; the value is what it is called in a sentence."""

    VISION = "a vision encoder (EVA-ViT-g)"
    QFORMER = "a BLIP-2 Q-Former"
    CHECKPOINT = "a MiniGPT-4 checkpoint"
    LANGUAGE_MODEL = "a language model"
    HUB_BLIP2 = "a BLIP-2 folder of a hub"
    MINIGPT_V2 = "a MiniGPT-v2 checkpoint"
    META = "Meta's own LLaMA files"
    OURS = "a model folder of minigpt4"


@dataclass(frozen=True)
class OriginalFiles:
    """The files that make a model.

    Args:
        vision: `eva_vit_g.pth`, or a converted BLIP-2 folder, which holds the Q-Former too.
        qformer: `blip2_pretrained_flant5xxl.pth`; None for a model without a Q-Former.
        language_model: A LLaMA or Vicuna folder.
        projection: `pretrained_minigpt4*.pth`; None leaves the projection new, for training.
    """

    vision: Path
    language_model: Path
    qformer: Path | None = None
    projection: Path | None = None

    def by_option(self) -> dict[str, Path]:
        """List the files by the option that names them, in the order in which the original loads them."""
        files = {
            "--vision": self.vision,
            "--qformer": self.qformer,
            "--language-model": self.language_model,
            "--projection": self.projection,
        }
        return {option: path for option, path in files.items() if path is not None}


class Target(NamedTuple):
    """A tensor's name in a full model folder; and the third of a fused query, key and value bias, or None."""

    name: str
    third: int | None = None


@dataclass(frozen=True)
class Pair:
    """Two names of one tensor: `#` is a number, `*` any end of a name, the same on both sides."""

    original: str
    ours: str
    third: int | None = None

    def to_ours(self, name: str) -> str | None:
        """Translate a name of the original, or return None."""
        return _translate(name, self.original, self.ours)

    def to_original(self, name: str) -> str | None:
        """Translate a name of this package, or return None."""
        return _translate(name, self.ours, self.original)


@cache
def _pattern(form: str) -> re.Pattern[str]:
    return re.compile(re.escape(form).replace(r"\#", r"(\d+)").replace(r"\*", r"(.*)"))


def _translate(name: str, form: str, other: str) -> str | None:
    match = _pattern(form).fullmatch(name)
    if match is None:
        return None
    found = iter(match.groups())
    return re.sub(r"[#*]", lambda _: next(found), other)


def _prefixed(pairs: Iterable[Pair], original: str) -> tuple[Pair, ...]:
    return tuple(Pair(original + pair.original, pair.ours, pair.third) for pair in pairs)


_LAYER = "model.vision_model.encoder.layers.#"
VISION_NAMES = (
    Pair("cls_token", "model.vision_model.embeddings.class_embedding"),
    Pair("pos_embed", "model.vision_model.embeddings.position_embedding"),
    Pair("patch_embed.proj.*", "model.vision_model.embeddings.patch_embedding.*"),
    Pair("blocks.#.norm1.*", f"{_LAYER}.layer_norm1.*"),
    Pair("blocks.#.attn.qkv.weight", f"{_LAYER}.self_attn.qkv.weight"),
    Pair("blocks.#.attn.q_bias", f"{_LAYER}.self_attn.qkv.bias", third=0),
    Pair("blocks.#.attn.v_bias", f"{_LAYER}.self_attn.qkv.bias", third=2),
    Pair("blocks.#.attn.proj.*", f"{_LAYER}.self_attn.projection.*"),
    Pair("blocks.#.norm2.*", f"{_LAYER}.layer_norm2.*"),
    Pair("blocks.#.mlp.fc1.*", f"{_LAYER}.mlp.fc1.*"),
    Pair("blocks.#.mlp.fc2.*", f"{_LAYER}.mlp.fc2.*"),
)
"""`eva_vit_g.pth`; in a whole model's state dict the same behind `visual_encoder.`."""

_BERT, _OURS = "Qformer.bert.encoder.layer.#", "model.qformer.encoder.layer.#"
QFORMER_NAMES = (
    Pair("query_tokens", "model.query_tokens"),
    Pair("ln_vision.*", "model.vision_model.post_layernorm.*"),
    Pair("Qformer.bert.embeddings.LayerNorm.*", "model.qformer.layernorm.*"),
    Pair(f"{_BERT}.attention.self.*", f"{_OURS}.attention.attention.*"),
    Pair(f"{_BERT}.attention.output.*", f"{_OURS}.attention.output.*"),
    Pair(f"{_BERT}.crossattention.self.*", f"{_OURS}.crossattention.attention.*"),
    Pair(f"{_BERT}.crossattention.output.*", f"{_OURS}.crossattention.output.*"),
    Pair(f"{_BERT}.intermediate_query.*", f"{_OURS}.intermediate_query.*"),
    Pair(f"{_BERT}.output_query.*", f"{_OURS}.output_query.*"),
)
"""`blip2_pretrained_flant5xxl.pth`."""

PROJECTION_NAMES = (Pair("llama_proj.*", "model.language_projection.*"),)

LANGUAGE_NAMES = (
    Pair("lm_head.*", "lm_head.*"),
    Pair("model.*", "model.language_model.*"),
)
"""A LLaMA folder; in a whole model's state dict the same behind `llama_model.`, with LoRA behind more."""

STATE_DICT_NAMES = (
    *_prefixed(VISION_NAMES, "visual_encoder."),
    *QFORMER_NAMES,
    *PROJECTION_NAMES,
    *_prefixed(LANGUAGE_NAMES, "llama_model."),
)
"""What the original's `state_dict()` calls everything; files may hold any part of it."""

_PEFT = "llama_model.base_model.model."
LORA_NAMES = (
    Pair(f"{_PEFT}model.layers.#.*.lora_A.weight", "model.language_model.layers.#.*.lora_A.default.weight"),
    Pair(f"{_PEFT}model.layers.#.*.lora_B.weight", "model.language_model.layers.#.*.lora_B.default.weight"),
)
"""The low-rank changes in MiniGPT-v2's checkpoints, as PEFT 0.2.0 called them, and as it calls them now."""

V2_NAMES = (*QFORMER_NAMES, *PROJECTION_NAMES, *LORA_NAMES, *_prefixed(LANGUAGE_NAMES, _PEFT))
"""A MiniGPT-v2 checkpoint; the first name that fits counts."""

HUB_NAMES = (
    Pair("query_tokens", "model.query_tokens"),
    Pair("vision_model.*", "model.vision_model.*"),
    Pair("qformer.*", "model.qformer.*"),
)
"""A converted BLIP-2 folder."""

NAMES: dict[Kind, tuple[Pair, ...]] = {
    Kind.VISION: VISION_NAMES,
    Kind.QFORMER: STATE_DICT_NAMES,
    Kind.CHECKPOINT: STATE_DICT_NAMES,
    Kind.LANGUAGE_MODEL: LANGUAGE_NAMES,
    Kind.HUB_BLIP2: HUB_NAMES,
    Kind.MINIGPT_V2: V2_NAMES,
}

_BUFFERS = (
    ("*rotary_emb.inv_freq", "computed when the model is built"),
    ("*.position_ids", "a list of positions, computed when it is needed"),
)
_STATE_DICT_IGNORED = (
    *_BUFFERS,
    ("t5_proj.*", "BLIP-2's own projection to flan-t5-xxl"),
    ("Qformer.cls.*", "the Q-Former's head for words, not used for pictures"),
    ("Qformer.bert.embeddings.word_embeddings.*", "the Q-Former reads no words here"),
    ("Qformer.bert.embeddings.position_embeddings.*", "the Q-Former reads no words here"),
    ("Qformer.bert.encoder.layer.#.intermediate.*", "the Q-Former's layer for words"),
    ("Qformer.bert.encoder.layer.#.output.*", "the Q-Former's layer for words"),
    ("vision_proj.*", "BLIP-2's first stage"),
    ("text_proj.*", "BLIP-2's first stage"),
    ("itm_head.*", "BLIP-2's first stage"),
    ("temp", "BLIP-2's first stage"),
    ("llama_model.*.SCB", "statistics of 8-bit training"),
    ("llama_model.*.weight_format", "statistics of 8-bit training"),
)
_VISION_IGNORED = (
    ("norm.*", "the encoder's last norm; its output is read before it"),
    ("fc_norm.*", "the encoder's last norm; its output is read before it"),
    ("head.*", "the encoder's classifier"),
    ("mask_token", "used in the encoder's own training"),
    (NUM_BLOCKS_MARK, "says how many blocks are used"),
)
IGNORED: dict[Kind, tuple[tuple[str, str], ...]] = {
    Kind.VISION: _VISION_IGNORED,
    Kind.QFORMER: _STATE_DICT_IGNORED,
    Kind.CHECKPOINT: _STATE_DICT_IGNORED,
    Kind.LANGUAGE_MODEL: _BUFFERS,
    Kind.MINIGPT_V2: _BUFFERS,
    Kind.HUB_BLIP2: (
        *_BUFFERS,
        ("language_model.*", "BLIP-2's own language model"),
        ("language_projection.*", "BLIP-2's own projection to flan-t5-xxl"),
    ),
}
"""Tensors that are known and not needed, and why; any other that has no place is an error."""


def to_ours(kind: Kind, name: str) -> Target | None:
    """Return where a tensor of a file of this kind goes; None where it has no place in the model."""
    for pair in NAMES[kind]:
        if (ours := pair.to_ours(name)) is not None:
            return Target(ours, pair.third)
    return None


def why_ignored(kind: Kind, name: str) -> str | None:
    """Return why a tensor is known and not needed; None where it is needed or not known."""
    return next((reason for form, reason in IGNORED[kind] if _pattern(form).fullmatch(name)), None)


def to_original(pairs: Sequence[Pair], name: str) -> list[tuple[str, int | None]]:
    """Return the original's names of a tensor of this package, each with the third of it that is meant.

    One name; two for a fused bias; none where the file with these pairs has no place for it.
    """
    found = ((pair.to_original(name), pair.third) for pair in pairs)
    return [(original, third) for original, third in found if original is not None]


def recognise(names: Collection[str]) -> Kind | None:
    """Tell what a file or folder is from the names of its tensors; None where it is nothing known."""
    if any(pair.to_ours(name) for name in names for pair in LORA_NAMES):
        return Kind.MINIGPT_V2
    for name, kind in _SIGNS:
        if name in names:
            return kind
    if any(name.startswith("Qformer.bert.") for name in names):
        return Kind.QFORMER
    return None


_SIGNS = (
    ("llama_proj.weight", Kind.CHECKPOINT),
    ("model.language_projection.weight", Kind.OURS),
    ("vision_model.embeddings.patch_embedding.weight", Kind.HUB_BLIP2),
    ("query_tokens", Kind.QFORMER),
    ("patch_embed.proj.weight", Kind.VISION),
    ("model.embed_tokens.weight", Kind.LANGUAGE_MODEL),
    ("layers.0.attention.wq.weight", Kind.META),
)
