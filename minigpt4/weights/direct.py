"""Loading a full folder in a third of the time, where its tensors lie under the model's own names.

The library's `from_pretrained` prepares for names that changed between its versions (a thousand regular expressions)
and for weights spread over devices. A folder of known kinds of parts needs neither: the model is built without drawing
weights, and the file's tensors are put into it. What comes out equals what `from_pretrained` returns, bit by bit; for
whatever is not that simple there is `from_pretrained`. Knows no names of models, no devices and no words of errors.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers import initialization as init

from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration

KINDS = {
    "vision_config": {
        "blip_2_vision_model",
        "clip_vision_model",
        "efficientnet_lite",
        "siglip_vision_model",
    },
    "qformer_config": {"blip_2_qformer"},
    "text_config": {"gpt2", "gpt_neox", "llama", "qwen2"},
}
"""Parts of which tests show that both ways give the same model; the library may change tensors of others as it reads
them, even under the same name."""

DTYPES = (torch.float32, torch.bfloat16)
"""In float16 the library keeps some parts in float32."""

LARGEST = 2 * 2**30
"""Bytes of a file of tensors. Of larger models the library's preparations are a small share of the time, and it spends
less memory: here the places of the tensors are reserved before their contents come."""

TENSORS_FILE = "model.safetensors"
GENERATION_FILE = "generation_config.json"
ADAPTER_FILE = "adapter_config.json"
PREPARED = ("quantization_config", "fusion_config", "transformers_weights")
"""Entries of a configuration upon which the library builds another model, or reads other files."""


def load_directly(folder: Path, dtype: torch.dtype) -> MiniGPT4ForConditionalGeneration | None:
    """Load the model of a full folder onto the CPU, if it is one that needs no preparation.

    Args:
        folder: A folder written by `save_pretrained`.
        dtype: The number type of all floating-point tensors.

    Returns:
        The model in evaluation mode; or None where `from_pretrained` has to decide: kinds of parts that are not in
        `KINDS`, other or larger files than usual, a tensor that is missing, too many or of another shape.

    Raises:
        OSError: A file cannot be read, or the configuration is not one.
        SafetensorError: The tensors are damaged.
        ValueError, TypeError, KeyError: The configuration holds something else than expected.
    """
    files = (folder / TENSORS_FILE, folder / GENERATION_FILE)
    if dtype not in DTYPES or not all(path.is_file() for path in files) or (folder / ADAPTER_FILE).exists():
        return None
    if (folder / TENSORS_FILE).stat().st_size > LARGEST or not _is_ours(folder):
        return None
    config = MiniGPT4Config.from_pretrained(folder, local_files_only=True)
    if not _is_known(config):
        return None
    config.name_or_path = str(folder)
    with init.no_init_weights():  # weights, that is: what a model computes for itself, as its angles, it has
        model = MiniGPT4ForConditionalGeneration._from_config(config, dtype=dtype)
    if not _fill(model, folder / TENSORS_FILE):
        return None
    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def _is_ours(folder: Path) -> bool:
    """Look before the library does: it makes the default model, of 8 billion parameters, of any configuration."""
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return isinstance(entries, dict) and entries.get("model_type") == MiniGPT4Config.model_type


def _is_known(config: MiniGPT4Config) -> bool:
    parts = {name: part for name in KINDS if (part := getattr(config, name)) is not None}
    return all(part.model_type in KINDS[name] for name, part in parts.items()) and not any(
        getattr(part, entry, None) is not None for part in (config, *parts.values()) for entry in PREPARED
    )


def _fill(model: MiniGPT4ForConditionalGeneration, file: Path) -> bool:
    """Put a file's tensors into a model whose weights are not tied yet; false, and untouched, if they do not fit."""
    places = model.state_dict()
    tied = model.all_tied_weights_keys  # {"lm_head.weight": name of the embedding table}, or nothing
    tensors = load_file(file)
    if tensors.keys() != places.keys() - tied.keys():
        return False
    if any(tensor.shape != places[name].shape for name, tensor in tensors.items()):
        return False
    tensors = {name: tensor.to(places[name].dtype) for name, tensor in tensors.items()}
    model.load_state_dict({**tensors, **{name: tensors[source] for name, source in tied.items()}}, assign=True)
    model.tie_weights()
    return True
