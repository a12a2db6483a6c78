"""The configuration of an original model, read from the shapes of its tensors.

Widths, depths, query counts and the vocabulary are in the shapes. What shapes cannot tell is the published value,
unless the user says otherwise. Knows names and shapes; opens no file.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.model import MiniGPT4Config
from minigpt4.text import counted
from minigpt4.weights.original.values import SECTIONS, as_number

Shape = tuple[int, ...]

PUBLISHED_VISION_WIDTH, PUBLISHED_BLOCKS = 1408, 39
PUBLISHED_QFORMER_WIDTH = 768
PUBLISHED_VISION = {"layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True}
PUBLISHED_QFORMER = {
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "use_qformer_text_input": False,
}
HEAD_SIZES = {"vision_config": 88, "qformer_config": 64, "text_config": 128}
"""Numbers of one attention head in the published parts: 1408 / 16, 768 / 12, and 4096 / 32 or 5120 / 40."""

PUBLISHED_CROSS_ATTENTION_FREQUENCY = 2
PUBLISHED_MERGED_TOKENS = 4

KNOWN_PROJECTIONS = {
    (4096, 768): ("prerained_minigpt4_7b.pth", "Vicuna 7B"),
    (5120, 768): ("pretrained_minigpt4.pth", "Vicuna 13B"),
    (4096, 5632): ("pretrained_minigpt4_llama2_7b.pth", "Llama-2-chat 7B, without a Q-Former"),
}
"""The published checkpoints by (width of the language model, width of what the projection reads)."""

_EMBEDDINGS, _BLOCKS = "model.vision_model.embeddings", "model.vision_model.encoder.layers"
_LAYERS = "model.qformer.encoder.layer"
_PART_NAMES = {"vision_config": "vision encoder", "qformer_config": "Q-Former", "text_config": "language model"}
_HEADS = "num_attention_heads"
_NOT_OF_THE_MODEL = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache")


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Read `--set` options into a nested dictionary.

    Args:
        overrides: `key=value` each, dotted for the parts' own keys (`vision_config.num_attention_heads=2`); the value
            is YAML.

    Raises:
        ConfigError: One has no value, or its value is not YAML, or its key is too deep.
    """
    read: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().rpartition(".")
        if not equals or not text.strip():
            raise ConfigError(
                f"--set {override} has no value", "for example: --set vision_config.num_attention_heads=2"
            )
        if dot and section not in SECTIONS:
            raise _unknown(section, SECTIONS)
        (read.setdefault(section, {}) if dot else read)[name] = read_value(text, f"--set {override}")
    return read


def read_value(text: str, where: str) -> Any:  # noqa: ANN401  (a number, a word, a list)
    """Read one value as YAML, with 1e-6 a number, which YAML 1.1 takes for a word.

    Raises:
        ConfigError: It is not YAML.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: the value is not YAML", "put it in quotes") from error
    return as_number(value)


def configuration(
    shapes: Mapping[str, Shape], text_config: Mapping[str, Any], overrides: Mapping[str, Any], *, has_qformer: bool
) -> tuple[MiniGPT4Config, list[str]]:
    """Build the configuration.

    Args:
        shapes: Of every tensor, by its name in a full model folder.
        text_config: The language model's own `config.json`.
        overrides: As `read_overrides` returns them.
        has_qformer: Whether the projection reads a Q-Former's output.

    Returns:
        The configuration, and sentences about published values that may not fit.

    Raises:
        ConfigError: An override that does not exist or is of the wrong type.
        WeightsError: A tensor that tells a size is missing or of a strange shape.
    """
    notes: list[str] = []
    values: dict[str, Any] = {
        "vision_config": _vision(shapes, overrides.get("vision_config", {}), notes),
        "qformer_config": _qformer(shapes, overrides.get("qformer_config", {}), notes) if has_qformer else None,
        "text_config": _text(shapes, text_config, overrides.get("text_config", {}), notes),
        "num_merged_tokens": PUBLISHED_MERGED_TOKENS,
        "post_layernorm_eps": 1e-5,
    }
    if has_qformer:
        values["num_query_tokens"] = shapes["model.query_tokens"][1]
    for key, value in overrides.items():
        if key not in SECTIONS:
            values[key] = value
        elif values[key] is None:
            notes.append(f"{key} is not used: this model has no Q-Former")
        else:
            values[key] |= value
    try:
        config = MiniGPT4Config(**values)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"these settings make no model: {' '.join(str(error).split())[:300]}", "check the values given by --set"
        ) from error
    _refuse_unknown(config, overrides)
    return config, notes


def _vision(shapes: Mapping[str, Shape], overrides: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    width = _shape(shapes, f"{_EMBEDDINGS}.class_embedding", 3)[-1]
    patch = _shape(shapes, f"{_EMBEDDINGS}.patch_embedding.weight", 4)[-1]
    places = _shape(shapes, f"{_EMBEDDINGS}.position_embedding", 3)[1] - 1
    grid = math.isqrt(places)
    if grid * grid != places:
        raise WeightsError(f"the table of positions has {places} places beside the first, which is no square")
    return {
        **PUBLISHED_VISION,
        _HEADS: _heads("vision_config", width, PUBLISHED_VISION_WIDTH, overrides, notes),
        "model_type": "blip_2_vision_model",
        "hidden_size": width,
        "intermediate_size": _shape(shapes, f"{_BLOCKS}.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": depth(shapes, _BLOCKS),
        "patch_size": patch,
        "image_size": grid * patch,
    }


def _qformer(shapes: Mapping[str, Shape], overrides: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    width = _shape(shapes, "model.query_tokens", 3)[-1]
    layers = depth(shapes, _LAYERS)
    crossing = [n for n in range(layers) if f"{_LAYERS}.{n}.crossattention.attention.key.weight" in shapes]
    # Every how many layers: the distance of the first two; with one or none of them the published 2 says the same.
    frequency = crossing[1] if len(crossing) > 1 else max(layers, PUBLISHED_CROSS_ATTENTION_FREQUENCY)
    return {
        **PUBLISHED_QFORMER,
        _HEADS: _heads("qformer_config", width, PUBLISHED_QFORMER_WIDTH, overrides, notes),
        "model_type": "blip_2_qformer",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": _shape(shapes, f"{_LAYERS}.0.intermediate_query.dense.weight", 2)[0],
        "cross_attention_frequency": frequency,
    }


def _text(
    shapes: Mapping[str, Shape], config: Mapping[str, Any], overrides: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    values = {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL}
    rows, width = _shape(shapes, "model.language_model.embed_tokens.weight", 2)
    if _HEADS not in values:
        values[_HEADS] = _heads("text_config", width, None, overrides, notes)
    if values.get("vocab_size", rows) != rows:
        notes.append(
            f"the language model's config.json says {values['vocab_size']} words, its tensors have {rows} rows; "
            f"{rows} is taken"
        )
    said, found = values.get("num_hidden_layers"), depth(shapes, "model.language_model.layers")
    if said is not None and said != found:
        raise WeightsError(
            f"the language model's config.json says {said} layers, its files hold {found}",
            "a file is missing or the config.json is another model's: fetch the folder again",
        )
    return values | {"vocab_size": rows}


def depth(shapes: Mapping[str, Shape], prefix: str) -> int:
    """Count the layers below a name: one more than the highest number there."""
    start = f"{prefix}."
    numbers = {name.removeprefix(start).partition(".")[0] for name in shapes if name.startswith(start)}
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


def _shape(shapes: Mapping[str, Shape], name: str, axes: int) -> Shape:
    shape = shapes.get(name)
    if shape is None or len(shape) != axes or not all(shape):
        what = "is missing" if shape is None else f"is {shape}, which is no shape for it"
        raise WeightsError(f"tensor {name} {what}", "fetch the file again from its publisher")
    return shape


def told_heads(section: str, width: int) -> int | None:
    """Return the heads of a part of this width, if they are of the published size; None where they cannot be."""
    heads, rest = divmod(width, HEAD_SIZES[section])
    return heads if not rest else None


def refuse_untold_heads(config: MiniGPT4Config, text_config: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuse a part whose heads nobody said and whose width the published head does not divide.

    Its numbers would be wrong and its shapes right, so nothing else would notice. Asked last: other mistakes are told
    first.

    Args:
        config: The configuration, with any number of heads in such a part.
        text_config: The language model's own `config.json`.
        overrides: As `read_overrides` returns them.

    Raises:
        ConfigError: There is such a part.
    """
    for section, name in _PART_NAMES.items():
        part = getattr(config, section)
        said = _HEADS in overrides.get(section, {}) or (section == "text_config" and _HEADS in text_config)
        if part is not None and not said and told_heads(section, part.hidden_size) is None:
            raise ConfigError(
                f"how many heads the {name} has cannot be told: it is {part.hidden_size} wide, which the published "
                f"{HEAD_SIZES[section]} numbers of a head do not divide",
                f"add --set {section}.{_HEADS}=N",
            )


def _heads(section: str, width: int, published: int | None, overrides: Mapping[str, Any], notes: list[str]) -> int:
    """Tell the heads from the width; 1, which fits any, where that is impossible or the user says them."""
    heads = told_heads(section, width)
    if heads is None or _HEADS in overrides:
        return 1
    if width != published:
        what = "config.json does not say its heads" if published is None else f"not the published {published}"
        notes.append(
            f"{section}: the width is {width}, {what}; {counted(heads, 'head')} of {HEAD_SIZES[section]} numbers, as "
            f"published, {'is' if heads == 1 else 'are'} taken; --set {section}.{_HEADS}=N if there are others"
        )
    return heads


def _refuse_unknown(config: MiniGPT4Config, overrides: Mapping[str, Any]) -> None:
    """Refuse a key that no part of the configuration has; the library would keep it and never read it."""
    for key, value in overrides.items():
        if key not in SECTIONS:
            known = [*MiniGPT4Config().to_dict(), *SECTIONS]
            if key not in known:
                raise _unknown(key, known)
            continue
        part = getattr(config, key)
        if part is None:
            continue
        known = list(type(part)().to_dict())
        for name in value:
            if name not in known:
                raise _unknown(f"{key}.{name}", [f"{key}.{one}" for one in known])


def _unknown(key: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "for example: vision_config.num_attention_heads"
    return ConfigError(f"--set {key}: there is no such key", hint)
