"""The version of a LLaMA or Vicuna folder: base, delta or merged, and what goes with it.

Told from rows, configuration and tokenizer files, and from the last norm's weights, which are near 1 in a model and
near 0 in a delta. What files cannot tell is taken from the folder's name and said so, or said to be unknown.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from minigpt4.errors import WeightsError
from minigpt4.text import read_json_object
from minigpt4.weights.files.tensor_files import TensorFiles
from minigpt4.weights.llama.tokenizer import VOCABULARY_FILE

LLAMA_ROWS, VICUNA_V0_ROWS = 32000, 32001
LLAMA_2_CONTEXT = 4096
LAST_NORM = "model.norm.weight"
EMBEDDINGS = "model.embed_tokens.weight"
LARGEST_NORM_OF_A_DELTA = 0.2
"""Mean of the last norm's weights: within a few hundredths of 0 in a delta, near 1 or above in a trained model."""

SIZE_NAMES = {(4096, 32): "7B", (5120, 40): "13B", (6656, 60): "30B", (8192, 80): "65B"}
"""By width and layers."""

_PAD = "[PAD]"
_NOT_V0 = (
    "the published MiniGPT-4 checkpoints were trained with Vicuna v0; with v1.1 and later answers are often garbled"
)
_BASE = "MiniGPT-4 was trained with Vicuna v0, which is this with a delta added: `minigpt4 weights apply-delta`"


@dataclass
class LanguageVersion:
    """What a language model is.

    Args:
        name: For a sentence: `"Vicuna v0"`.
        is_delta: Whether it is the difference of two models, which must be merged first.
        template: The prompt template that fits; None where it cannot be told, or for a delta's base.
        size: `"7B"`, or the sizes where they are not a published model's.
        notes: Sentences: what could not be told, what goes with it.
    """

    name: str
    is_delta: bool
    template: str | None
    size: str
    notes: list[str] = field(default_factory=list)


def tell_version(path: Path, tensors: TensorFiles, config: Mapping[str, Any]) -> LanguageVersion:
    """Tell which language model a folder or file holds.

    Args:
        path: A folder, or a single file of tensors.
        tensors: What is in it.
        config: The folder's `config.json`; empty where there is none.
    """
    rows, width = tensors.shape(EMBEDDINGS)
    layers = config.get("num_hidden_layers") or _layers(tensors)
    size = SIZE_NAMES.get((width, layers), f"{layers} layers, {width} wide")
    folder = path if path.is_dir() else path.parent
    pieces = _pieces(folder)
    if config.get("model_type", "llama") != "llama" or not (pieces or rows in (LLAMA_ROWS, VICUNA_V0_ROWS)):
        return LanguageVersion("none of LLaMA's or Vicuna's", False, None, size)
    padded = rows == VICUNA_V0_ROWS or _has_pad(folder) or rows == pieces + 1
    if is_delta(tensors):
        return _delta("v0" if padded else "v1.1", size, rows)
    if padded:
        return LanguageVersion("Vicuna v0, merged", False, "vicuna-v0", size)
    names = f"{folder.absolute().name} {config.get('_name_or_path', '')}".lower()
    # Llama-2 reads 4096 tokens and has an epsilon of 1e-5; LLaMA has 2048 and 1e-6.
    if config.get("max_position_embeddings", 0) >= LLAMA_2_CONTEXT or config.get("rms_norm_eps") == 1e-5:
        return _llama_2(names, folder, size)
    return _llama_1(names, size)


def is_delta(tensors: TensorFiles) -> bool:
    """Return whether tensors are the difference of two language models, by the last norm; False without that norm."""
    if LAST_NORM not in tensors.names():
        return False
    return bool(tensors.read(LAST_NORM).float().mean().abs() < LARGEST_NORM_OF_A_DELTA)


def _delta(version: str, size: str, rows: int) -> LanguageVersion:
    last = f", the last one for {_PAD}" if version == "v0" else ""
    note = f"a delta of {version} ({rows} rows{last}) is no model: add it to the LLaMA it was made from with "
    notes = [f"{note}`minigpt4 weights apply-delta`", *([] if version == "v0" else [_NOT_V0])]
    return LanguageVersion(f"Vicuna {version}, delta", True, "vicuna-v0" if version == "v0" else None, size, notes)


def _llama_2(names: str, folder: Path, size: str) -> LanguageVersion:
    if "vicuna" in names:
        return LanguageVersion("Vicuna v1.5, by its name; a Llama-2 by its configuration", False, None, size, [_NOT_V0])
    config = _json(folder / "tokenizer_config.json")
    if "chat" in names or "[INST]" in str(config.get("chat_template", "")):
        return LanguageVersion("Llama-2-chat", False, "llama-2", size)
    note = "whether it is the chat model, which MiniGPT-4 needs, cannot be told from its files"
    return LanguageVersion("Llama-2", False, "llama-2", size, [note])


def _llama_1(names: str, size: str) -> LanguageVersion:
    version = re.search(r"v1\.[0-9]", names)
    if "vicuna" in names and "v0" not in names:
        name = f"Vicuna {version[0] if version else 'v1.1'}, merged, by its name"
        return LanguageVersion(name, False, None, size, [_NOT_V0])
    if "llama" in names and "vicuna" not in names:
        return LanguageVersion("LLaMA, by its name", False, None, size, [_BASE])
    note = "base LLaMA and merged Vicuna v1.1 have files of the same form; the name says neither"
    return LanguageVersion("LLaMA or Vicuna v1.1, merged", False, None, size, [note])


def _layers(tensors: TensorFiles) -> int:
    return len({name.split(".")[2] for name in tensors.names() if name.startswith("model.layers.")})


def _has_pad(folder: Path) -> bool:
    """Return whether the tokenizer files know the token that Vicuna v0 added."""
    if _PAD in _json(folder / "added_tokens.json"):
        return True
    token = _json(folder / "special_tokens_map.json").get("pad_token")
    return (token.get("content") if isinstance(token, dict) else token) == _PAD


def _pieces(folder: Path) -> int:
    """Count the words of a SentencePiece vocabulary; 0 where none can be read."""
    path = folder / VOCABULARY_FILE
    if not path.is_file():
        return 0
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError, TypeError):
        return 0  # `missing` names the file
    return int(processor.GetPieceSize())


def _json(path: Path) -> dict[str, Any]:
    """Read a small file of the tokenizer; what is missing or broken tells nothing."""
    try:
        return read_json_object(path, WeightsError, "")
    except WeightsError:
        return {}
