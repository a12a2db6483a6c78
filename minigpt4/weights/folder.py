"""Model folders: loading any of them by name or path.

Two kinds, both safetensors and JSON. A *full* folder is what `save_pretrained` writes. An *alignment* folder holds
only what was trained, and where the frozen parts come from.
"""

import hashlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoProcessor, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minigpt4.errors import ConfigError, StorageError, WeightsError
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
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
from minigpt4.weights.direct import load_directly
from minigpt4.weights.files.atomic import MANIFEST_NAME, scratch_folder, verify_folder, write_folder
from minigpt4.weights.hub import hub_folder, is_on_hub
from minigpt4.weights.parts import home

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much; bytes, or 0 of 0 where it cannot be known."""

JOINED_KEPT = 8
"""So many alignments over nano stay in the cache as they were joined, 0.3 GB each: the last ones loaded."""

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, SafetensorError)
"""What the library raises of files that are missing or damaged."""

_CASTS = "MatMul8bitLt: inputs will be cast"
"""What bitsandbytes says of every layer at every token; it is how its 8-bit weights work."""

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
        report: Told of fetching and converting, which happen on first use.

    Returns:
        The model in evaluation mode, and the processor.

    Raises:
        WeightsError: There is no such model, or its files are missing, damaged or do not fit each other.
        DownloadError: A frozen part, or a model of the hub, is not here and cannot be fetched.
        ConfigError: The device or the number type does not exist here, or `language_model` is given for a full folder,
            which has its own.
    """
    chosen_device, chosen_dtype = placement(device, dtype)
    options = {"dtype": chosen_dtype, "local_files_only": True, **quantization(quantize, chosen_device)}
    folder = _folder_of(str(name_or_path), report, language_model)
    if (folder / ALIGNMENT_FILE).is_file():  # over a model that is no part of nano
        base, processor = load(frozen_parts_of(folder), device=device, dtype=dtype, quantize=quantize, report=report)
        return apply_alignment(folder, base, processor).eval(), processor
    try:
        model: Any = load_directly(folder, chosen_dtype) if quantize == "none" else None
        unfit: list[str] = []
        if model is None:
            model, loading = MiniGPT4ForConditionalGeneration.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
            # The library would go on with random numbers in their places.
            unfit = sorted([*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])])
        processor = MiniGPT4Processor.from_pretrained(folder, local_files_only=True)
    except _UNREADABLE as error:
        raise _incomplete(folder, error) from error
    if unfit:
        raise WeightsError(
            f"{folder} is not a complete model folder: tensor {unfit[0]} is missing or of another shape",
            hint="write it again, or name another folder",
        )
    if quantize == "none":
        model.to(chosen_device)  # a quantized model was placed while it was loaded
    return model.eval(), processor


def load_processor(name_or_path: str | Path = "nano", *, report: Report | None = None) -> MiniGPT4Processor:
    """Load the processor of a model without the model, whose tensors are not read.

    Args:
        name_or_path: As for `load`. An alignment has the processor of the model that it lies over.
        report: Told of fetching and converting, which happen on first use.

    Raises:
        WeightsError: There is no such model, or files of the processor are missing or damaged.
        DownloadError: A frozen part, or a model of the hub, is not here and cannot be fetched.
    """
    name = str(name_or_path)
    path = hub_folder(name, report) if is_on_hub(name) else Path(name)
    if name != NANO and (path / ALIGNMENT_FILE).is_file():
        return load_processor(frozen_parts_of(path), report=report)
    folder = _folder_of(name, report, None)
    try:
        return MiniGPT4Processor.from_pretrained(folder, local_files_only=True)
    except _UNREADABLE as error:
        raise _incomplete(folder, error) from error


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
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"number type {dtype} is not known, expected auto, float32, bfloat16 or float16",
            hint="leave it out for auto",
        )
    return chosen, getattr(torch, dtype)


def quantization(quantize: str, device: torch.device) -> dict[str, Any]:
    """Return the library's options for a language model in fewer bits; everything else keeps its number type.

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
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_tells_more_than_casts)
    warnings.filterwarnings("ignore", message=_CASTS)  # as its versions before 0.50 say it
    config = BitsAndBytesConfig(
        load_in_8bit=quantize == "int8",
        load_in_4bit=quantize == "nf4",
        bnb_4bit_quant_type="nf4",
        # Full names: the library compares them with a module's from its start or its end.
        llm_int8_skip_modules=["model.vision_model", "model.qformer", "model.language_projection", "lm_head"],
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def _tells_more_than_casts(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CASTS)


def _folder_of(name: str, report: Report | None, language_model: Path | None) -> Path:
    """Find the full folder that a name or path stands for, building it from frozen parts where need be."""
    if name == "nano":
        return built_folder(nano.ALIGNMENT_DIR, report, language_model)
    path = hub_folder(name, report) if is_on_hub(name) else Path(name)
    if (path / ALIGNMENT_FILE).is_file():
        if holds_all_of_nano(path):
            return built_folder(path, report, language_model)
        _refuse_other(language_model, name)
        return path
    if (path / "config.json").is_file():
        _refuse_other(language_model, name)
        _refuse_other_kind(name, path / "config.json")
        return path
    if path.is_file():
        raise WeightsError(f"{name} is a file, expected a model folder", _cure_of_file(path))
    if path.is_dir():
        raise WeightsError(
            f"{name} is not a model folder: it has neither config.json nor {ALIGNMENT_FILE}",
            hint="name one that was written by save_pretrained or by minigpt4 train",
        )
    if (path.parent / "checkpoints").is_dir():
        raise WeightsError(
            f"there is no model {name!r}, the training in {path.parent} has not ended",
            hint="`minigpt4 train` with the same recipe goes on; the alignment comes at its end",
        )
    raise WeightsError(f"there is no model {name!r}", hint="run `minigpt4 models` to see what is here")


def origin(name_or_path: str) -> Origin:
    """Return what a model that was loaded by this name is made of, for an alignment that is trained on it."""
    if name_or_path == NANO:
        return origin_of(NANO, nano.ALIGNMENT_DIR)
    path = hub_folder(name_or_path) if is_on_hub(name_or_path) else Path(name_or_path)
    return origin_of(name_or_path, path)


def _refuse_other_kind(name: str, config: Path) -> None:
    """Refuse another kind of model; the library would make the default model, of 8 billion parameters, of it."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{config.parent} is not a complete model folder: config.json cannot be read as JSON",
            hint="write it again, or name another folder",
        ) from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind == MiniGPT4Config.model_type:
        return
    if not isinstance(kind, str):
        raise WeightsError(
            f"{config.parent} is not a complete model folder: its config.json names no model_type",
            hint="write it again, or name another folder",
        )
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


def _cure_of_file(path: Path) -> str:
    """Name what to do with a file in a folder's place: with a folder's own, with one of the original's."""
    if (path.parent / "config.json").is_file() or (path.parent / ALIGNMENT_FILE).is_file():
        return f"name its folder, {path.parent}"
    return (
        "`minigpt4 weights inspect` says what it is, `minigpt4 weights import` makes a folder of the original's files"
    )


def _refuse_other(language_model: Path | None, name: str) -> None:
    if language_model is not None:
        raise ConfigError(
            f"{name} is a full model with a language model of its own, {language_model} cannot take its place",
            hint="leave the other language model out, or name nano or an alignment of it",
        )


def built_folder(alignment: Path, report: Report | None, language_model: Path | None = None) -> Path:
    """Join an alignment with its frozen parts, once; return the full folder in the cache.

    It is named by the content of the alignment and of the parts, so a changed alignment is built anew. A new one takes
    the place of the one that was not loaded for longest, where there are `JOINED_KEPT` of them.

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
        with suppress(OSError):  # a cache of somebody else's: then its folders are not removed either
            os.utime(target)
        return target
    language_model_dir, vision_weights = nano.frozen_parts(report, language_model)
    if report:
        report("joining the parts", 0, 0)
    if language_model is not None:  # before it is joined: another model may not even fit
        trained_with = read_description(alignment)["language_model"]
        compare_language_models(
            trained_with, fingerprint(*nano.read_language_model(language_model_dir)), alignment.name
        )
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
    """Remove the joined folders but those last loaded; a model in memory needs its own no more."""
    with suppress(OSError, StorageError), scratch_folder(models) as scratch:
        joined = sorted(models.glob(f"{NANO}-{'[0-9a-f]' * 16}"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in joined[JOINED_KEPT:]:
            path.rename(scratch / path.name)


def _incomplete(folder: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{folder} is not a complete model folder: {_first_line(error)}", hint="write it again, or name another folder"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
