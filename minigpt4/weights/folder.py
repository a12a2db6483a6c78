"""Model folders: loading any of them by name or path, and writing an alignment.

Two kinds, both safetensors and JSON. A *full* folder is what `save_pretrained` writes. An *alignment* folder holds
only what was trained, where the frozen parts come from, and a fingerprint of the language model it was trained with.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.processing.image_processing import MiniGPT4ImageProcessor
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.weights import nano
from minigpt4.weights.direct import load_directly
from minigpt4.weights.files.atomic import MANIFEST_NAME, verify_folder, write_folder
from minigpt4.weights.hub import hub_folder, is_hub_id
from minigpt4.weights.parts import home

ALIGNMENT_FILE = "alignment.json"
TENSORS_FILE = "alignment.safetensors"
FORMAT = "minigpt4-alignment"
FORMAT_VERSION = 1
SAMPLED_ROWS, SAMPLED_COLUMNS = 32, 8
SAME_MODEL = 0.98
"""Cosine of two samples of embeddings: a 4-bit copy of SmolLM2 has more than 0.99, an unrelated model about 0."""

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much; bytes, or 0 of 0 where it cannot be known."""

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
        name_or_path: `"nano"`, an alignment folder, a full folder, or a full folder's id on the Hugging Face hub
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
        ConfigError: The device or the number type does not exist here.
    """
    chosen_device, chosen_dtype = placement(device, dtype)
    options = {"dtype": chosen_dtype, "local_files_only": True, **quantization(quantize, chosen_device)}
    folder = _folder_of(str(name_or_path), report, language_model)
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
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(
            f"{folder} is not a complete model folder: {_first_line(error)}",
            hint="write it again, or name another folder",
        ) from error
    if unfit:
        raise WeightsError(
            f"{folder} is not a complete model folder: tensor {unfit[0]} is missing or of another shape",
            hint="write it again, or name another folder",
        )
    if quantize == "none":
        model.to(chosen_device)  # a quantized model was placed while it was loaded
    return model.eval(), processor


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
        raise ConfigError(f"number type {dtype} is not known, expected auto, float32, bfloat16 or float16")
    return chosen, getattr(torch, dtype)


def quantization(quantize: str, device: torch.device) -> dict[str, Any]:
    """Return the library's options for a language model in fewer bits; everything else keeps its number type.

    Raises:
        ConfigError: A kind that does not exist, or bitsandbytes is not installed.
    """
    if quantize == "none":
        return {}
    if quantize not in ("int8", "nf4"):
        raise ConfigError(f"quantization {quantize} is not known, expected none, int8 or nf4")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization {quantize} needs bitsandbytes", hint='pip install "minigpt4[quant]"')
    config = BitsAndBytesConfig(
        load_in_8bit=quantize == "int8",
        load_in_4bit=quantize == "nf4",
        bnb_4bit_quant_type="nf4",
        # Full names: the library compares them with a module's from its start or its end.
        llm_int8_skip_modules=["model.vision_model", "model.qformer", "model.language_projection", "lm_head"],
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def fingerprint(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Describe a language model so that another one is told from it.

    Returns:
        Its sizes, a hash of its vocabulary, and a sample of its embeddings, by which another copy of the same model
        (in other bits, say) is recognised although its numbers differ a little.
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


def save_alignment(
    target: Path,
    model: MiniGPT4ForConditionalGeneration,
    processor: MiniGPT4Processor,
    *,
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write what was trained: an alignment folder over nano's frozen parts.

    Args:
        target: The folder to appear, whole or not at all.
        model: The trained model.
        processor: Its processor; its tokenizer is part of the fingerprint.
        files: Further text files by name, such as a model card.
        overwrite: Replace an alignment folder that stands there.
    """
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "frozen_parts": "nano",
        "language_model": fingerprint(model.model.language_model, processor.tokenizer),
    }
    tensors = {
        name: parameter.detach().to(torch.bfloat16).contiguous()
        for name, parameter in model.model.named_parameters()
        if parameter.requires_grad
    }
    with write_folder(target, overwrite=overwrite) as folder:
        save_file(tensors, folder / TENSORS_FILE)
        (folder / ALIGNMENT_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def apply_alignment(
    folder: Path, model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor
) -> MiniGPT4ForConditionalGeneration:
    """Put an alignment's tensors into a model of the frozen parts it was trained with.

    Raises:
        WeightsError: It was trained with another language model, lacks a tensor, or has one of another shape.
    """
    verify_folder(folder)
    description = _read_description(folder)
    _compare(description["language_model"], fingerprint(model.model.language_model, processor.tokenizer), folder.name)
    tensors = load_file(folder / TENSORS_FILE)
    parameters = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())[0]
        raise WeightsError(f"the alignment {folder.name} and the model differ in tensor {odd}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise WeightsError(
                    f"tensor {name} of the alignment {folder.name} is {tuple(tensors[name].shape)}, "
                    f"expected {tuple(parameter.shape)}"
                )
            parameter.copy_(tensors[name])
    return model


def _compare(trained_with: dict[str, Any], here: dict[str, Any], name: str) -> None:
    """Refuse a language model that is not the one an alignment was trained with, nor another copy of it."""
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


def _folder_of(name: str, report: Report | None, language_model: Path | None) -> Path:
    """Find the full folder that a name or path stands for, building it from frozen parts where need be."""
    path = Path(name)
    if name == "nano":
        return built_folder(nano.ALIGNMENT_DIR, report, language_model)
    if (path / ALIGNMENT_FILE).is_file():
        return built_folder(path, report, language_model)
    if (path / "config.json").is_file():
        return path
    if path.is_dir():
        raise WeightsError(
            f"{name} is not a model folder: it has neither config.json nor {ALIGNMENT_FILE}",
            hint="name a folder written by save_pretrained or by minigpt4 train",
        )
    if not path.exists() and is_hub_id(name):
        fetched = hub_folder(name)
        if not (fetched / "config.json").is_file():
            raise WeightsError(f"{name} on the hub is not a model folder: it has no config.json", "name another model")
        return fetched
    raise WeightsError(f"there is no model {name!r}", hint="run `minigpt4 models` to see what is here")


def built_folder(alignment: Path, report: Report | None, language_model: Path | None = None) -> Path:
    """Join an alignment with its frozen parts, once; return the full folder in the cache.

    It is named by the content of the alignment and of the parts, so a changed alignment is built anew.
    """
    content = (alignment / MANIFEST_NAME).read_bytes() + nano.version(language_model).encode()
    digest = hashlib.sha256(content).hexdigest()
    target = home() / "models" / f"{_read_description(alignment)['frozen_parts']}-{digest[:16]}"
    if target.exists():
        verify_folder(target, deep=False)
        return target
    language_model_dir, vision_weights = nano.frozen_parts(report, language_model)
    if report:
        report("joining the parts", 0, 0)
    if language_model is not None:  # before it is joined: another model may not even fit
        trained_with = _read_description(alignment)["language_model"]
        _compare(trained_with, fingerprint(*nano.read_language_model(language_model_dir)), alignment.name)
    model, tokenizer = nano.assemble(language_model_dir, vision_weights)
    processor = nano.make_processor(model.config, tokenizer)
    apply_alignment(alignment, model, processor)
    model.model.language_model.to(torch.bfloat16)  # exact: that is how it came
    with write_folder(target, overwrite=True) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return target


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        description = json.loads((folder / ALIGNMENT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder / ALIGNMENT_FILE} cannot be read as JSON") from error
    if description.get("format") != FORMAT or description.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"{folder} is {description.get('format')} version {description.get('format_version')}, "
            f"expected {FORMAT} version {FORMAT_VERSION}",
            hint="update minigpt4, or write the alignment again",
        )
    result: dict[str, Any] = description
    return result


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
