"""Alignment folders: what was trained, where the frozen parts come from, and which language model it belongs to.

The frozen parts are nano's, or a model folder or hub id that is loaded first. The fingerprint of the language model
tells another one apart, and recognises another copy of the same.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.text import first_line, read_json_object
from minigpt4.weights.files.atomic import verify_folder, write_folder
from minigpt4.weights.hub import is_hub_id

ALIGNMENT_FILE = "alignment.json"
TENSORS_FILE = "alignment.safetensors"
FORMAT = "minigpt4-alignment"
FORMAT_VERSION = 1
SAMPLED_ROWS, SAMPLED_COLUMNS = 32, 8
SAME_MODEL = 0.98
"""Cosine of two samples of embeddings: a 4-bit copy of SmolLM2 has more than 0.99, an unrelated model about 0."""

PLACE_BEFORE = "frozen_parts_were_at"
"""Entry of an alignment whose frozen parts are named from its own folder: their whole path."""

NANO = "nano"
JOINING_PARTS = ("query_tokens", "qformer", "language_projection")


@dataclass(frozen=True)
class Origin:
    """What a trained model began from.

    Args:
        frozen_parts: `"nano"`, or the folder or hub id of the model that is loaded before the alignment's tensors. An
            alignment of nano that has more than the joining parts is loaded over nano, too.
        tensors: Names of tensors that differ from those of the frozen parts already; kept whether or not they train.
        lora: Settings of adapters on the language model: `rank`, `alpha`, `dropout`, `target_modules`; empty for none.
    """

    frozen_parts: str
    tensors: frozenset[str] = frozenset()
    lora: Mapping[str, Any] = field(default_factory=dict)


def origin_of(name: str, folder: Path) -> Origin:
    """Return the origin of a model that continues another one.

    Args:
        name: What was loaded: `"nano"`, a folder, or a hub id.
        folder: Where its alignment is, or the full folder it is.
    """
    if not (folder / ALIGNMENT_FILE).is_file():
        return Origin(str(folder.resolve()) if Path(name).exists() else name)
    description = read_description(folder)
    with safe_open(folder / TENSORS_FILE, "pt") as file:
        return Origin(frozen_parts_of(folder), frozenset(file.keys()), description.get("lora", {}))


def holds_all_of_nano(folder: Path) -> bool:
    """Return whether an alignment is all that nano's frozen parts lack, and nothing else."""
    description = read_description(folder)
    if description["frozen_parts"] != NANO or description.get("lora"):
        return False
    verify_folder(folder, deep=False)
    with safe_open(folder / TENSORS_FILE, "pt") as file:
        return all(name.partition(".")[0] in JOINING_PARTS for name in file.keys())  # noqa: SIM118  (no dict)


def frozen_parts_of(folder: Path) -> str:
    """Return where an alignment's frozen parts come from.

    A relative path is that from the alignment's folder, or else from where it was written: either may have been moved.

    Raises:
        WeightsError: The folder is in neither place.
    """
    description = read_description(folder)
    named = str(description["frozen_parts"])
    if named == NANO:
        return named
    for place in (folder / named, Path(str(description.get(PLACE_BEFORE, named)))):
        if place.is_dir():
            return str(place.resolve())
    if is_hub_id(named):
        return named
    raise WeightsError(
        f"{folder} is an alignment over the frozen parts of {named}, which is not a folder here",
        hint=f"move that model along, to {os.path.normpath(folder.resolve() / named)}",
    )


def fingerprint(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a language model's sizes, a hash of its vocabulary and a sample of its embeddings.

    By the sample another copy of the same model (in other bits, say) is recognised although its numbers differ a bit.
    """
    table: Tensor = language_model.get_input_embeddings().weight  # type: ignore[assignment]  # an embedding table
    rows = torch.linspace(0, len(table) - 1, SAMPLED_ROWS).long()
    sample = table.detach()[rows, :SAMPLED_COLUMNS].float().flatten().tolist()
    vocabulary = "\n".join(f"{token} {i}" for token, i in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1]))
    return {
        "vocabulary": len(table),
        "width": table.shape[1],
        "layers": language_model.config.num_hidden_layers,
        "tokens": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "embeddings": [round(value, 5) for value in sample],
    }


def alignment_tensors(model: MiniGPT4ForConditionalGeneration, origin: Origin) -> dict[str, Tensor]:
    """Return what an alignment has to hold: what trains, and what differed from the frozen parts before."""
    return {
        name: parameter.detach()
        for name, parameter in model.model.named_parameters()
        if parameter.requires_grad or name in origin.tensors
    }


def save_alignment(
    target: Path,
    model: MiniGPT4ForConditionalGeneration,
    processor: MiniGPT4Processor,
    *,
    origin: Origin | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an alignment folder.

    Args:
        target: The folder to appear, whole or not at all.
        model: The trained model.
        processor: Its processor; its tokenizer is part of the fingerprint.
        origin: What it began from; left out, nano's frozen parts.
        tensors: What it holds, where the model's own are spread over processes; see `alignment_tensors`.
        files: Further text files by name, such as a model card.
        overwrite: Replace an alignment folder that stands there.
    """
    origin = origin or Origin(NANO)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "frozen_parts": origin.frozen_parts,
        "language_model": fingerprint(model.model.language_model, processor.tokenizer),
    }
    from_here = Path(os.path.normpath(target.resolve() / origin.frozen_parts))
    if origin.frozen_parts != NANO and not Path(origin.frozen_parts).is_absolute() and from_here.is_dir():
        description[PLACE_BEFORE] = str(from_here)
    if origin.lora:
        description["lora"] = dict(origin.lora)
    if tensors is None:
        tensors = alignment_tensors(model, origin)
    with write_folder(target, overwrite=overwrite) as folder:
        kept = {name: t.to(_kept_dtype(name, origin)).contiguous() for name, t in tensors.items()}
        save_file(kept, folder / TENSORS_FILE)
        (folder / ALIGNMENT_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def _kept_dtype(name: str, origin: Origin) -> torch.dtype:
    """Return the type a tensor is kept in: float32, and for nano's many joining parts bfloat16, which is enough.

    What was trained before, as its vision encoder was, changes by less than bfloat16 resolves.
    """
    of_nano = origin.frozen_parts == NANO and name.partition(".")[0] in JOINING_PARTS
    return torch.bfloat16 if of_nano else torch.float32


def apply_alignment(
    folder: Path, model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor
) -> MiniGPT4ForConditionalGeneration:
    """Put an alignment's tensors into a model of the frozen parts it was trained with.

    Raises:
        ConfigError: It has adapters, and peft is not installed.
        WeightsError: It was trained with another language model, lacks a tensor that nano's frozen parts do not have,
            or has one that the model has not, or of another shape, or that is not finite.
    """
    verify_folder(folder)
    description = read_description(folder)
    here = fingerprint(model.model.language_model, processor.tokenizer)
    compare_language_models(description["language_model"], here, folder.name)
    if description.get("lora"):
        add_lora(model, description["lora"])
    tensors = load_file(folder / TENSORS_FILE)
    parameters = dict(model.model.named_parameters())
    joining = {name for name, p in parameters.items() if p.requires_grad and ".lora_" not in name}
    hint = "load it with the frozen parts it was trained with: its alignment.json names them"
    odd = sorted(tensors.keys() - parameters.keys())
    if description["frozen_parts"] == NANO:
        odd += sorted(joining - tensors.keys())
    if odd:
        raise WeightsError(f"the alignment {folder.name} and the model differ in tensor {odd[0]}", hint)
    for name, tensor in tensors.items():
        what = f"tensor {name} of the alignment {folder.name}"
        if parameters[name].shape != tensor.shape:
            raise WeightsError(f"{what} is {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}", hint)
        if not tensor.sum(dtype=torch.float64).isfinite():  # one pass: what is no number spoils the sum
            raise WeightsError(
                f"{what} holds numbers that are infinite or none",
                "train it again with a lower learning rate, or from a checkpoint before",
            )
        parameters[name].detach().copy_(tensor)
    return model


def require_peft() -> None:
    """Raise ConfigError if peft, the library for adapters, is not installed."""
    if find_spec("peft") is None:
        raise ConfigError("adapters (lora) need peft", hint='pip install "minigpt4[train]"')


def add_lora(model: MiniGPT4ForConditionalGeneration, settings: Mapping[str, Any]) -> None:
    """Put low-rank adapters (arXiv 2106.09685) into the language model; they change nothing until they are trained.

    `settings` are `rank`, `alpha`, `dropout`, and `target_modules` or None for the attention's queries and values.

    Raises:
        ConfigError: peft is not installed, or the language model has no such modules.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["target_modules"] or ["q_proj", "v_proj"],
    )
    try:
        inject_adapter_in_model(config, model.model.language_model)
    except ValueError as error:
        raise ConfigError(
            f"the language model has no modules for adapters: {first_line(error)}",
            hint="name its modules in lora.target_modules",
        ) from error


def compare_language_models(trained_with: dict[str, Any], here: dict[str, Any], name: str) -> None:
    """Raise WeightsError if a language model is neither the one an alignment was trained with nor a copy of it."""
    hint = "use the language model it was trained with, or train an alignment for this one"
    for key in ("vocabulary", "width", "layers", "tokens"):
        if here[key] != trained_with[key]:
            raise WeightsError(
                f"the alignment {name} was trained with a language model whose {key} is {trained_with[key]}, "
                f"this one's is {here[key]}",
                hint,
            )
    samples = torch.tensor([trained_with["embeddings"], here["embeddings"]])
    likeness = torch.cosine_similarity(samples[0], samples[1], dim=0).item()
    if likeness < SAME_MODEL:
        raise WeightsError(
            f"the alignment {name} was trained with a language model whose embeddings have a likeness of "
            f"{likeness:.3f} to this one's, expected {SAME_MODEL} or more",
            hint,
        )


def read_description(folder: Path) -> dict[str, Any]:
    """Read an alignment's `alignment.json`.

    Raises:
        WeightsError: It cannot be read, or is of another format or version.
    """
    hint = "copy the alignment again: it was cut short, or is no alignment"
    description = read_json_object(folder / ALIGNMENT_FILE, WeightsError, hint)
    if description.get("format") != FORMAT or description.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"{folder} is {description.get('format')} version {description.get('format_version')}, "
            f"expected {FORMAT} version {FORMAT_VERSION}",
            hint="update minigpt4, or write the alignment again",
        )
    return description
