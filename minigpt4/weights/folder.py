"""Model folders: loading any of them by name or path.

Two kinds, both safetensors and JSON. A *full* folder is what `save_pretrained` writes. An *alignment* folder holds
only what was trained, and where the frozen parts come from.
"""

import hashlib
import importlib.util
import logging
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor, BitsAndBytesConfig, GenerationConfig
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minigpt4.errors import ConfigError, StorageError, WeightsError
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.text import DTYPES, first_line, read_json_object
from minigpt4.weights import nano
from minigpt4.weights.alignment import (
    ALIGNMENT_FILE,
    NANO,
    Origin,
    apply_alignment,
    compare_language_models,
    fingerprint,
    frozen_parts_of,
    holds_all_of_nano,
    origin_of,
    read_description,
)
from minigpt4.weights.files.atomic import MANIFEST_NAME, verify_folder, write_folder
from minigpt4.weights.files.disk import scratch_folder
from minigpt4.weights.hub import Report, hub_folder, is_on_hub
from minigpt4.weights.parts import home

JOINED_KEPT = 8
"""Alignments over nano that stay in the cache as they were joined, 0.3 GB each: the last ones loaded."""

FAST_KINDS = {
    "vision_config": {"blip_2_vision_model", "clip_vision_model", "efficientnet_lite", "siglip_vision_model"},
    "qformer_config": {"blip_2_qformer"},
    "text_config": {"gpt2", "gpt_neox", "llama", "qwen2"},
}
"""Parts of which tests show that the fast way gives the same model; of others the library may change tensors as it
reads them, even under the same name."""

FAST_DTYPES = (torch.float32, torch.bfloat16)
"""In float16 the library keeps some parts in float32."""

FAST_BYTES = 2 * 2**30
"""Largest file for the fast way. The library's preparations are a small share of a larger one's time, and the library
needs less memory for it."""

_PREPARED = ("quantization_config", "fusion_config", "transformers_weights")
"""Entries of a configuration upon which the library builds another model, or reads other files."""

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, SafetensorError)
"""What the library raises of files that are missing or damaged."""

_CASTS = "MatMul8bitLt: inputs will be cast"
"""What bitsandbytes warns of for every layer and token; its 8-bit weights work so."""

AutoImageProcessor.register(MiniGPT4Config, image_processor_classes={"pil": MiniGPT4ImageProcessor})
AutoProcessor.register(MiniGPT4Config, MiniGPT4Processor)


def load(
    name_or_path: str | Path = "nano",
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
    language_model: Path | None = None,
    report: Report | None = None,
) -> tuple[MiniGPT4ForConditionalGeneration, MiniGPT4Processor]:
    """Load a model and its processor.

    Args:
        name_or_path: `"nano"`, an alignment folder, a full folder, or the id of one of these on the Hugging Face hub
            (`owner/name` or `owner/name@revision`).
        device: `"auto"` (an accelerator where there is one, else the CPU), `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`.
        dtype: `"auto"` (float32 on the CPU, bfloat16 elsewhere), `"float32"`, `"bfloat16"`, `"float16"`.
        quantize: `"none"`; or `"int8"` or `"nf4"` for the language model, which needs the extra `quant`.
        language_model: A folder with another copy of the language model that the alignment was trained with, such as
            one from a hub; for `"nano"` and alignment folders.
        report: Called while parts are fetched and converted, which happens on first use.

    Returns:
        The model in evaluation mode, and the processor.

    Raises:
        WeightsError: There is no such model, or its files are missing, damaged or do not fit each other.
        DownloadError: A frozen part, or a model of the hub, is not here and cannot be fetched.
        ConfigError: The device or the number type does not exist here, or `language_model` is given for a full folder,
            which has its own.
    """
    chosen_device, chosen_dtype = placement(device, dtype)
    options = quantization(quantize, chosen_device)
    folder = _folder_of(str(name_or_path), report, language_model)
    if (folder / ALIGNMENT_FILE).is_file():  # over a model that is no part of nano
        base, processor = load(frozen_parts_of(folder), device=device, dtype=dtype, quantize=quantize, report=report)
        return apply_alignment(folder, base, processor).eval(), processor
    try:
        model = load_fast(folder, chosen_dtype) if quantize == "none" else None
        model = model or _load_by_library(folder, dtype=chosen_dtype, **options)
        processor = MiniGPT4Processor.from_pretrained(folder, local_files_only=True)
    except _UNREADABLE as error:
        raise _incomplete(folder, first_line(error)) from error
    if quantize == "none":
        model.to(chosen_device)  # type: ignore[arg-type]  # a quantized model was placed while it was loaded
    return model.eval(), processor


def _load_by_library(folder: Path, **options: Any) -> MiniGPT4ForConditionalGeneration:
    model: Any
    model, loading = MiniGPT4ForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True, **options
    )
    # The library would go on with random numbers in their places.
    unfit = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    if unfit:
        raise _incomplete(folder, f"tensor {min(unfit)} is missing or of another shape")
    return model


def load_fast(folder: Path, dtype: torch.dtype) -> MiniGPT4ForConditionalGeneration | None:
    """Load a full folder onto the CPU in a third of `from_pretrained`'s time, bit by bit the same.

    `from_pretrained` prepares for names that changed between the library's versions (a thousand regular expressions)
    and for weights spread over devices. Known kinds of parts in one file need neither: the model is built without
    drawing weights, and the file's tensors become its own.

    Returns:
        The model in evaluation mode; or None where `from_pretrained` has to decide: other kinds of parts, other or
        larger files than usual, a tensor that is missing, too many or of another shape.
    """
    file, generation = folder / "model.safetensors", folder / "generation_config.json"
    if dtype not in FAST_DTYPES or not file.is_file() or not generation.is_file():
        return None
    if file.stat().st_size > FAST_BYTES or (folder / "adapter_config.json").exists():
        return None
    config = MiniGPT4Config.from_pretrained(folder, local_files_only=True)
    parts = {name: part for name in FAST_KINDS if (part := getattr(config, name)) is not None}
    if any(part.model_type not in FAST_KINDS[name] for name, part in parts.items()):
        return None
    if any(getattr(part, entry, None) is not None for part in (config, *parts.values()) for entry in _PREPARED):
        return None
    config.name_or_path = str(folder)
    with init.no_init_weights():  # weights only: what a model computes for itself, as its angles, it has
        model = MiniGPT4ForConditionalGeneration._from_config(config, dtype=dtype)
    expected = model.state_dict()
    tied = model.all_tied_weights_keys  # {"lm_head.weight": name of the embedding table}, or nothing
    tensors = load_file(file)
    if tensors.keys() != expected.keys() - tied.keys():
        return None
    if any(tensor.shape != expected[name].shape for name, tensor in tensors.items()):
        return None
    tensors = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    model.load_state_dict({**tensors, **{name: tensors[source] for name, source in tied.items()}}, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def load_processor(name_or_path: str | Path = "nano", *, report: Report | None = None) -> MiniGPT4Processor:
    """Load the processor of a model, as `load` does, without reading the model's tensors."""
    name = str(name_or_path)
    path = hub_folder(name, report) if is_on_hub(name) else Path(name)
    if name != NANO and (path / ALIGNMENT_FILE).is_file():
        return load_processor(frozen_parts_of(path), report=report)
    folder = _folder_of(name, report, None)
    try:
        return MiniGPT4Processor.from_pretrained(folder, local_files_only=True)
    except _UNREADABLE as error:
        raise _incomplete(folder, first_line(error)) from error


def placement(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Choose where and in which numbers a model runs; see `load`.

    Raises:
        ConfigError: The device or the number type does not exist here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {device} is not available here", hint="use --device cpu") from error
    if dtype == "auto":
        dtype = "float32" if chosen.type == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ConfigError(
            f"number type {dtype} is not known, expected auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}",
            hint="leave it out for auto",
        )
    return chosen, getattr(torch, dtype)


def quantization(quantize: str, device: torch.device) -> dict[str, Any]:
    """Return the library's options for a language model in fewer bits.

    Raises:
        ConfigError: A kind that does not exist, or bitsandbytes is not installed.
    """
    if quantize == "none":
        return {}
    if quantize not in ("int8", "nf4"):
        raise ConfigError(
            f"quantization {quantize} is not known, expected none, int8 or nf4", hint="leave it out for none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization {quantize} needs bitsandbytes", hint='pip install "minigpt4[quant]"')
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)
    warnings.filterwarnings("ignore", message=_CASTS)  # as its versions before 0.50 say it
    config = BitsAndBytesConfig(
        load_in_8bit=quantize == "int8",
        load_in_4bit=quantize == "nf4",
        bnb_4bit_quant_type="nf4",
        # Full names: the library compares them with a module's from its start or its end.
        llm_int8_skip_modules=["model.vision_model", "model.qformer", "model.language_projection", "lm_head"],
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def _is_no_cast(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CASTS)


def _folder_of(name: str, report: Report | None, language_model: Path | None) -> Path:
    """Return the folder of a name or path: a full one, built from frozen parts if need be, or an alignment's."""
    if name == NANO:
        return built_folder(nano.ALIGNMENT_DIR, report, language_model)
    path = hub_folder(name, report) if is_on_hub(name) else Path(name)
    is_alignment = (path / ALIGNMENT_FILE).is_file()
    if is_alignment and holds_all_of_nano(path):
        return built_folder(path, report, language_model)
    if not is_alignment and not (path / "config.json").is_file():
        raise _no_model(name, path)
    if language_model is not None:
        raise ConfigError(
            f"{name} is a full model with a language model of its own, {language_model} cannot take its place",
            hint="leave the other language model out, or name nano or an alignment of it",
        )
    if not is_alignment:
        _refuse_other_kind(name, path / "config.json")
    return path


def _no_model(name: str, path: Path) -> WeightsError:
    """Explain why a path is no model folder."""
    if path.is_file():
        hint = "`minigpt4 weights inspect` says what it is, `minigpt4 weights import` makes a folder of the original's"
        if (path.parent / "config.json").is_file() or (path.parent / ALIGNMENT_FILE).is_file():
            hint = f"name its folder, {path.parent}"
        return WeightsError(f"{name} is a file, expected a model folder", hint)
    if path.is_dir():
        return WeightsError(
            f"{name} is not a model folder: it has neither config.json nor {ALIGNMENT_FILE}",
            hint="name one that was written by save_pretrained or by minigpt4 train",
        )
    if (path.parent / "checkpoints").is_dir():
        return WeightsError(
            f"there is no model {name!r}, the training in {path.parent} has not ended",
            hint="`minigpt4 train` with the same recipe goes on; the alignment comes at its end",
        )
    return WeightsError(f"there is no model {name!r}", hint="run `minigpt4 models` to see what is here")


def _refuse_other_kind(name: str, config: Path) -> None:
    """Refuse another kind of model; the library would make the default model, of 8 billion parameters, of it."""
    content = read_json_object(config, lambda message, _: _incomplete(config.parent, message), "")
    kind = content.get("model_type")
    if kind == MiniGPT4Config.model_type:
        return
    if not isinstance(kind, str):
        raise _incomplete(config.parent, "its config.json names no model_type")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise WeightsError(
            f"{name} is a language model ({kind}), which is one part of a MiniGPT-4 and sees no pictures",
            hint=f"make a model of it: `minigpt4 weights import --language-model {name}` with the original's other "
            "files, or `minigpt4 train` with a recipe that names it at model.language_model",
        )
    raise WeightsError(
        f"{name} is a model of the type {kind}, expected {MiniGPT4Config.model_type}",
        hint="name a folder that `minigpt4 weights import` or `minigpt4 train` wrote",
    )


def _incomplete(folder: Path, why: str) -> WeightsError:
    return WeightsError(
        f"{folder} is not a complete model folder: {why}", hint="write it again, or name another folder"
    )


def origin(name_or_path: str) -> Origin:
    """Return what a model loaded by this name is made of, for an alignment that is trained on it."""
    if name_or_path == NANO:
        return origin_of(NANO, nano.ALIGNMENT_DIR)
    path = hub_folder(name_or_path) if is_on_hub(name_or_path) else Path(name_or_path)
    return origin_of(name_or_path, path)


def built_folder(alignment: Path, report: Report | None, language_model: Path | None = None) -> Path:
    """Join an alignment with nano's frozen parts, once; return the full folder in the cache.

    Its name is a digest of the alignment's and the parts' content. The one that was loaded least recently makes room
    for a new one where there are `JOINED_KEPT` of them.

    Raises:
        WeightsError: The alignment is incomplete, or does not fit the parts.
        DownloadError: A part is not here and cannot be fetched.
    """
    verify_folder(alignment, deep=False)
    content = (alignment / MANIFEST_NAME).read_bytes() + nano.version(language_model).encode()
    digest = hashlib.sha256(content).hexdigest()
    target = home() / "models" / f"{NANO}-{digest[:16]}"
    if target.exists():
        verify_folder(target, deep=False)
        with suppress(OSError):  # another user's cache: then its folders are not removed either
            os.utime(target)
        return target
    language_model_dir, vision_weights = nano.frozen_parts(report, language_model)
    if report:
        report("joining the parts", 0, 0)
    if language_model is not None:  # before it is joined: another model may not even fit
        here = fingerprint(*nano.read_language_model(language_model_dir))
        compare_language_models(read_description(alignment)["language_model"], here, alignment.name)
    model, tokenizer = nano.assemble(language_model_dir, vision_weights)
    processor = nano.make_processor(model.config, tokenizer)
    apply_alignment(alignment, model, processor)
    model.model.language_model.to(torch.bfloat16)  # exact: that is how it came
    with write_folder(target, overwrite=True) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    _remove_unused(target.parent)
    return target


def _remove_unused(models: Path) -> None:
    """Remove the joined folders but those last loaded; a model in memory does not need its own any more."""
    with suppress(OSError, StorageError), scratch_folder(models) as scratch:
        joined = sorted(models.glob(f"{NANO}-{'[0-9a-f]' * 16}"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in joined[JOINED_KEPT:]:
            path.rename(scratch / path.name)
