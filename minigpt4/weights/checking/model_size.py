"""The sizes of a model that decide how much memory it takes, from its configuration: nothing is loaded or fetched.

Takes what `--model` takes, and a language model's folder, whose weights can be checked too.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from minigpt4.errors import WeightsError
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.weights.alignment import ALIGNMENT_FILE
from minigpt4.weights.checking.needs import LANGUAGE, NANO_CONTEXT, PROJECTION, RESAMPLER, VISION, ModelSize
from minigpt4.weights.nano import nano_config

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

_PARTS = (
    ("model.vision_model.", VISION),
    ("model.qformer.", RESAMPLER),
    ("model.query_tokens", RESAMPLER),
    ("model.language_projection.", PROJECTION),
)


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


def describe(name: str) -> Described:
    """Tell a model's sizes.

    Args:
        name: `"nano"`, an alignment folder, a full folder, or a language model's folder.

    Raises:
        WeightsError: There is no such model, or its configuration cannot be used.
    """
    path = Path(name)
    if name == "nano":
        return Described(name, "nano", _size_of_nano())
    if (path / ALIGNMENT_FILE).is_file():
        return Described(name, "alignment", _size_of_nano(), path)
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
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise WeightsError(
            f"{path / 'config.json'} describes no model that can run here: {reason}",
            "`minigpt4 weights inspect` says what the folder is",
        ) from error


def size_of(config: MiniGPT4Config) -> ModelSize:
    """Count a model's numbers by part, on no device."""
    with torch.device("meta"):
        model = MiniGPT4ForConditionalGeneration(config)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():  # a tied head counts once
        part = next((part for prefix, part in _PARTS if name.startswith(prefix)), LANGUAGE)
        counts[part] += parameter.numel()
    return _size(
        {part: counts[part] for part in (VISION, RESAMPLER, PROJECTION, LANGUAGE) if counts[part]},
        model.model.language_model.modules(),
        config.text_config,
        image_tokens=config.num_image_tokens,
        image_size=int(config.vision_config.image_size),
    )


def size_of_language_model(config: PreTrainedConfig) -> ModelSize:
    """Count a language model's numbers, on no device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return _size({LANGUAGE: numbers}, model.base_model.modules(), config)


def _size(
    parameters: dict[str, int],
    modules: Iterable[torch.nn.Module],
    text: Any,  # noqa: ANN401  (any language model's configuration)
    *,
    image_tokens: int = 0,
    image_size: int = 0,
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
        # GPT-2 and its like do not say: four widths.
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_heads=heads,
        vocabulary=text.vocab_size,
        max_context=getattr(text, "max_position_embeddings", None),
        image_tokens=image_tokens,
        image_size=image_size,
    )


def _size_of_nano() -> ModelSize:
    return size_of(nano_config(LlamaConfig(**SMOLLM2_SIZES), image_token_id=0))
