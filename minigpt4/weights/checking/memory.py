"""How much memory a model takes where it is to run: arithmetic over its configuration, before anything is loaded."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from minigpt4.errors import WeightsError
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.text import first_line
from minigpt4.weights.alignment import ALIGNMENT_FILE
from minigpt4.weights.checking.models import LIBRARIES_BYTES, NANO_CONTEXT
from minigpt4.weights.nano import nano_config

ACCELERATOR_CONTEXT_BYTES = 500_000_000
"""What CUDA keeps on a device for itself once a process uses it; drivers differ by a factor of about two."""

MARGIN = 0.25
"""How far the estimate may be from the peak that a process is measured to reach on a CPU; `tests` hold it to this."""

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
PACKED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Of one number of a packed matrix; nf4 keeps a float32 scale for every 64 numbers."""

PACKED_BYTES_ON_CPU = {"int8": 4.0, "nf4": 2.5}
"""Measured with bitsandbytes 0.50: there it keeps an unpacked copy beside the packed one, whole for int8."""

CACHE_COPIES_ON_CPU = 2
"""Measured: the cache grows by a copy for each new token, and what the copies leave free is too small for the next."""

DEFAULT_CONTEXT = 2048
PIXEL_VALUES_PER_CHANNEL = 40
"""Numbers that a vision encoder holds at once for each number of a picture, about; 224 pixels give 24 MB."""

VISION, RESAMPLER, PROJECTION, LANGUAGE = "vision encoder", "Q-Former", "projection", "language model"
CACHE, FEATURES, WORKING, LIBRARIES = "cache of the conversation", "pictures", "working space", "libraries"

SMOLLM2_SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": NANO_CONTEXT,
    "tie_word_embeddings": True,
}
"""Of nano's language model, which may not have been fetched yet."""

_PARTS = {
    "model.vision_model.": VISION,
    "model.qformer.": RESAMPLER,
    "model.query_tokens": RESAMPLER,
    "model.language_projection.": PROJECTION,
}


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that decide how much memory it takes.

    Args:
        parameters: Numbers in each part, by the part's name.
        packable: Those of the language model that quantization packs: its layers' matrices.
        num_layers: Of the language model.
        cached_width: Numbers that one layer caches for a token: keys and values of all heads.
        hidden_size: Width of the language model.
        intermediate_size: Width inside its feed-forward layers.
        num_heads: Its attention heads.
        vocabulary: Its words.
        max_context: Tokens it can read; None where it does not say.
        image_tokens: Places a picture takes; 0 for a language model alone.
        image_size: Pixels along a side; 0 for a language model alone.
    """

    parameters: Mapping[str, int]
    packable: int
    num_layers: int
    cached_width: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocabulary: int
    max_context: int | None = None
    image_tokens: int = 0
    image_size: int = 0


@dataclass(frozen=True)
class Described:
    """A model that was asked about.

    Args:
        name: As it was asked for.
        kind: `"nano"`, `"alignment"`, `"full"` or `"language model"`.
        size: Its sizes.
        folder: Where its configuration lies; None for nano, whose folder may not have been made yet.
    """

    name: str
    kind: str
    size: ModelSize
    folder: Path | None = None


@dataclass(frozen=True)
class Placement:
    """Where and how a model is to run.

    Args:
        device: `"cpu"`, `"cuda:0"`, `"mps"`.
        dtype: One of `DTYPE_BYTES`.
        quantize: `"none"`, `"int8"` or `"nf4"`.
        num_beams: Answers followed at once.
        context: Tokens of the conversation and the answer together.
    """

    device: str = "cpu"
    dtype: str = "float32"
    quantize: str = "none"
    num_beams: int = 1
    context: int = DEFAULT_CONTEXT


@dataclass(frozen=True)
class Need:
    """What a placement takes.

    Args:
        on_device: Bytes on the device, by what they are for.
        loading: Bytes of the computer's own memory while the model is loaded onto a device with memory of its own.
    """

    on_device: Mapping[str, int]
    loading: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.on_device.values())


def need(size: ModelSize, placement: Placement) -> Need:
    """Return what a placement takes.

    On a CPU the estimate is of what the process holds at its fullest, within `MARGIN`. A process seems to take more
    while it reads its weight file: the system can take those pages of the file back.
    """
    number = DTYPE_BYTES[placement.dtype]
    on_device = {part: round(count * number) for part, count in size.parameters.items()}
    if placement.quantize != "none":
        table = PACKED_BYTES_ON_CPU if placement.device == "cpu" else PACKED_BYTES
        on_device[LANGUAGE] -= round(size.packable * max(0.0, number - table[placement.quantize]))
    copies = CACHE_COPIES_ON_CPU if placement.device == "cpu" else 1
    tokens = placement.context * placement.num_beams
    on_device[CACHE] = round(copies * tokens * size.num_layers * size.cached_width * number)
    if size.image_size:
        pixels = 3 * size.image_size**2
        embedded = size.image_tokens * size.hidden_size
        on_device[FEATURES] = round(number * (PIXEL_VALUES_PER_CHANNEL * pixels + embedded))
    # One layer works at a time: its feed-forward part holds three numbers of its inner width for a token, the rest
    # about six of the model's width, and its part of the cache is copied when it grows. The scores of all words are in
    # float32, a few copies of them for each beam.
    a_token = 6 * size.hidden_size + 3 * size.intermediate_size + size.cached_width
    on_device[WORKING] = round(tokens * a_token * number + placement.num_beams * size.vocabulary * 4 * 4)
    if placement.device in ("cpu", "mps"):
        return Need({**on_device, LIBRARIES: LIBRARIES_BYTES})
    weights = 0 if placement.quantize != "none" else round(sum(size.parameters.values()) * number)
    return Need({**on_device, LIBRARIES: ACCELERATOR_CONTEXT_BYTES}, loading=LIBRARIES_BYTES + weights)


def describe(name: str) -> Described:
    """Return a model's sizes; nothing is loaded or fetched.

    Args:
        name: `"nano"`, an alignment folder, a full folder, or a language model's folder.

    Raises:
        WeightsError: There is no such model, or its configuration cannot be used.
    """
    path = Path(name)
    is_alignment = (path / ALIGNMENT_FILE).is_file()
    if name == "nano" or is_alignment:
        size = size_of(nano_config(LlamaConfig(**SMOLLM2_SIZES), image_token_id=0))
        return Described(name, "alignment", size, path) if is_alignment else Described(name, "nano", size)
    if not (path / "config.json").is_file():
        if path.exists():
            hint = "`minigpt4 weights inspect` says what it is"
            raise WeightsError(f"{name} is not a model folder: it has neither config.json nor {ALIGNMENT_FILE}", hint)
        raise WeightsError(f"there is no model {name!r}", hint="run `minigpt4 models` to see what is here")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if isinstance(config, MiniGPT4Config):
            return Described(name, "full", size_of(config), path)
        return Described(name, "language model", size_of_language_model(config), path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path / 'config.json'} describes no model that can run here: {first_line(error)}",
            "`minigpt4 weights inspect` says what the folder is",
        ) from error


def size_of(config: MiniGPT4Config) -> ModelSize:
    """Count a model's numbers by part, on no device."""
    with torch.device("meta"):
        model = MiniGPT4ForConditionalGeneration(config)
    counts = Counter(dict.fromkeys((VISION, RESAMPLER, PROJECTION, LANGUAGE), 0))
    for name, parameter in model.named_parameters():  # a tied head counts once
        part = next((part for prefix, part in _PARTS.items() if name.startswith(prefix)), LANGUAGE)
        counts[part] += parameter.numel()
    return _size(
        {part: count for part, count in counts.items() if count},
        model.model.language_model.modules(),
        config.text_config,
        max_context=config.max_context,
        image_tokens=config.num_image_tokens,
        image_size=int(config.vision_config.image_size),
    )


def size_of_language_model(config: PreTrainedConfig) -> ModelSize:
    """Count a language model's numbers, on no device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    context = getattr(config, "max_position_embeddings", None)
    return _size({LANGUAGE: numbers}, model.base_model.modules(), config, max_context=context)


def _size(
    parameters: dict[str, int],
    modules: Iterable[torch.nn.Module],
    text: Any,  # noqa: ANN401  (any language model's configuration)
    **others: Any,
) -> ModelSize:
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    return ModelSize(
        parameters=parameters,
        packable=sum(module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear)),
        num_layers=text.num_hidden_layers,
        cached_width=2 * key_value_heads * head_width,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,  # GPT-2 does not say
        num_heads=heads,
        vocabulary=text.vocab_size,
        **others,
    )
