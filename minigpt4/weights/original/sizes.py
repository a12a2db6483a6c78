"""What the original published, and the configuration of a model told from the shapes of its tensors.

Widths, depths, query counts and the vocabulary are in the shapes; what shapes cannot tell has the published value,
unless the user says otherwise. Knows names and numbers only: opens no file and loads no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.text import counted, did_you_mean
from minigpt4.weights.original.names import Kind

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """One of the original's models, by the `arch` and `model_type` of its YAML files.

    Args:
        name: What people call it.
        arch: As in the YAML files.
        model_type: As in the YAML files.
        defaults: The YAML file with its defaults, in the original's `minigpt4/configs/models`.
        template: Prompt template of its demo.
        end_symbol: What ends an answer in its training.
        has_qformer: Whether its projection reads a Q-Former's output, or merged patches.
        image_size: Side of a picture in pixels.
        has_lora: Whether its language model has low-rank changes.
        refusal: Why it is not imported; empty for a model that is.
    """

    name: str
    arch: str
    model_type: str
    defaults: str
    template: str
    end_symbol: str = "###"
    has_qformer: bool = True
    image_size: int = 224
    has_lora: bool = False
    refusal: str = ""


MINIGPT_V2 = Family(
    "MiniGPT-v2", "minigpt_v2", "pretrain", "minigpt_v2.yaml", "minigpt-v2", end_symbol="</s>", has_qformer=False,
    image_size=448, has_lora=True, refusal="comes in a later version of minigpt4",
)  # fmt: skip
FAMILIES = (
    Family("MiniGPT-4", "mini_gpt4", "pretrain_vicuna", "minigpt4.yaml", "vicuna-v0"),
    Family("MiniGPT-4", "minigpt4", "pretrain_vicuna0", "minigpt4_vicuna0.yaml", "vicuna-v0-spaced"),
    Family(
        "MiniGPT-4 with Llama-2", "minigpt4", "pretrain_llama2", "minigpt4_llama2.yaml", "llama-2", end_symbol="</s>",
        has_qformer=False,
    ),
    MINIGPT_V2,
)  # fmt: skip
"""Every model of the original's; of two alike the first is the one that a checkpoint without a YAML is taken for."""

KNOWN_PROJECTIONS = {
    (4096, 768): ("prerained_minigpt4_7b.pth", "Vicuna 7B"),
    (5120, 768): ("pretrained_minigpt4.pth", "Vicuna 13B"),
    (4096, 5632): ("pretrained_minigpt4_llama2_7b.pth", "Llama-2-chat 7B, without a Q-Former"),
}
"""The published checkpoints by (width of the language model, width of what the projection reads)."""

EVA_WIDTH, EVA_BLOCKS, EVA_BLOCKS_USED = 1408, 40, 39
"""The file of EVA-ViT-g holds 40 blocks; BLIP-2, and so MiniGPT-4, reads the output of the last but one."""

QFORMER_WIDTH = 768
FLAN_T5_WIDTHS = {4096: "flan-t5-xxl", 2048: "flan-t5-xl"}
"""BLIP-2's language models by width; MiniGPT-4 uses the Q-Former of the first."""

MERGED_TOKENS = 4
"""Consecutive patches that are one token in a model without a Q-Former."""

PUBLISHED = {
    "vision_config": {"layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True},
    "qformer_config": {
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "use_qformer_text_input": False,
    },
}
"""What the shapes of a part do not tell."""

SECTIONS = ("vision_config", "qformer_config", "text_config")
"""The parts of a model's configuration that have keys of their own."""

HEADS = "num_attention_heads"
HEAD_SIZES = {"vision_config": 88, "qformer_config": 64, "text_config": 128}
"""Numbers of one attention head in the published parts: 1408 / 16, 768 / 12, and 4096 / 32 or 5120 / 40."""

_WIDTHS = {"vision_config": EVA_WIDTH, "qformer_config": QFORMER_WIDTH}
_PART_NAMES = {"vision_config": "vision encoder", "qformer_config": "Q-Former", "text_config": "language model"}
_NOT_OF_THE_MODEL = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache")

_EMBEDDINGS, _BLOCKS = "model.vision_model.embeddings", "model.vision_model.encoder.layers"
_LAYERS = "model.qformer.encoder.layer"
_TABLE, _QUERIES, _PROJECTION = (
    "model.language_model.embed_tokens.weight", "model.query_tokens", "model.language_projection.weight",
)  # fmt: skip


def family_of(*, has_qformer: bool) -> Family:
    """Return the family that a checkpoint is taken for where no YAML says it."""
    return next(family for family in FAMILIES if family.has_qformer == has_qformer)


def as_number(value: Any) -> Any:  # noqa: ANN401
    """Return a number for a word such as 1e-4, which YAML 1.1 takes for text; anything else as it is."""
    if not isinstance(value, str) or "e" not in value.lower():
        return value
    try:
        return float(value)
    except ValueError:
        return value


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
            raise ConfigError(f"--set {override} has no value", f"for example: --set vision_config.{HEADS}=2")
        if dot and section not in SECTIONS:
            raise unknown_override(section, SECTIONS)
        try:
            value = as_number(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not YAML", "put it in quotes") from error
        (read.setdefault(section, {}) if dot else read)[name] = value
    return read


def unknown_override(key: str, known: Sequence[str]) -> ConfigError:
    """Return the error for a `--set` whose key does not exist."""
    return ConfigError(
        f"--set {key}: there is no such key", did_you_mean(key, known, f"for example: vision_config.{HEADS}")
    )


def config_values(
    shapes: Mapping[str, Shape], text_config: Mapping[str, Any], overrides: Mapping[str, Any], *, has_qformer: bool
) -> tuple[dict[str, Any], list[str]]:
    """Tell a model's configuration.

    Args:
        shapes: Of every tensor, by its name in a full model folder.
        text_config: The language model's own `config.json`.
        overrides: As `read_overrides` returns them.
        has_qformer: Whether the projection reads a Q-Former's output.

    Returns:
        What `MiniGPT4Config` takes, and sentences about published values that may not fit.

    Raises:
        WeightsError: A tensor that tells a size is missing or of a strange shape.
    """
    notes: list[str] = []
    values: dict[str, Any] = {
        "vision_config": _vision(shapes, overrides.get("vision_config", {}), notes),
        "qformer_config": _qformer(shapes, overrides.get("qformer_config", {}), notes) if has_qformer else None,
        "text_config": _text(shapes, text_config, overrides.get("text_config", {}), notes),
        "num_merged_tokens": MERGED_TOKENS,
        "post_layernorm_eps": 1e-5,
    }
    if has_qformer:
        values["num_query_tokens"] = shapes[_QUERIES][1]
    for key, value in overrides.items():
        if key not in SECTIONS:
            values[key] = value
        elif values[key] is None:
            notes.append(f"{key} is not used: this model has no Q-Former")
        else:
            values[key] |= value
    return values, notes


def _vision(shapes: Mapping[str, Shape], overrides: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    width = _shape(shapes, f"{_EMBEDDINGS}.class_embedding", 3)[-1]
    patch = _shape(shapes, f"{_EMBEDDINGS}.patch_embedding.weight", 4)[-1]
    places = _shape(shapes, f"{_EMBEDDINGS}.position_embedding", 3)[1] - 1
    grid = math.isqrt(places)
    if grid * grid != places:
        raise WeightsError(f"the table of positions has {places} places beside the first, which is no square")
    return {
        **PUBLISHED["vision_config"],
        HEADS: _heads("vision_config", width, overrides, notes),
        "model_type": "blip_2_vision_model",
        "hidden_size": width,
        "intermediate_size": _shape(shapes, f"{_BLOCKS}.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": depth(shapes, _BLOCKS),
        "patch_size": patch,
        "image_size": grid * patch,
    }


def _qformer(shapes: Mapping[str, Shape], overrides: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    width = _shape(shapes, _QUERIES, 3)[-1]
    layers = depth(shapes, _LAYERS)
    crossing = [n for n in range(layers) if f"{_LAYERS}.{n}.crossattention.attention.key.weight" in shapes]
    return {
        **PUBLISHED["qformer_config"],
        HEADS: _heads("qformer_config", width, overrides, notes),
        "model_type": "blip_2_qformer",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": _shape(shapes, f"{_LAYERS}.0.intermediate_query.dense.weight", 2)[0],
        # The distance of the first two; where there is one or none, the published 2 says the same.
        "cross_attention_frequency": crossing[1] if len(crossing) > 1 else max(layers, 2),
    }


def _text(
    shapes: Mapping[str, Shape], config: Mapping[str, Any], overrides: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    values = {key: value for key, value in config.items() if key not in _NOT_OF_THE_MODEL}
    rows, width = _shape(shapes, _TABLE, 2)
    if HEADS not in values:
        values[HEADS] = _heads("text_config", width, overrides, notes)
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


def published_heads(section: str, width: int) -> int | None:
    """Return the heads of a part of this width if they are of the published size; None if that does not divide it."""
    heads, rest = divmod(width, HEAD_SIZES[section])
    return heads if not rest else None


def refuse_untold_heads(
    widths: Mapping[str, int], text_config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Refuse a part whose heads nothing says and whose width the published head does not divide.

    Its numbers would be wrong and its shapes right, so nothing else would notice. Call it last, after other mistakes.

    Args:
        widths: Of the parts that the model has, by section.
        text_config: The language model's own `config.json`.
        overrides: As `read_overrides` returns them.

    Raises:
        ConfigError: There is such a part.
    """
    for section, width in widths.items():
        said = HEADS in overrides.get(section, {}) or (section == "text_config" and HEADS in text_config)
        if not said and published_heads(section, width) is None:
            raise ConfigError(
                f"how many heads the {_PART_NAMES[section]} has cannot be told: it is {width} wide, which the "
                f"published {HEAD_SIZES[section]} numbers of a head do not divide",
                f"add --set {section}.{HEADS}=N",
            )


def _heads(section: str, width: int, overrides: Mapping[str, Any], notes: list[str]) -> int:
    """Return the heads told by the width; 1, which fits any width, where that is impossible or the user says them."""
    heads = published_heads(section, width)
    if heads is None or HEADS in overrides:
        return 1
    published = _WIDTHS.get(section)
    if width != published:
        what = "config.json does not say its heads" if published is None else f"not the published {published}"
        notes.append(
            f"{section}: the width is {width}, {what}; {counted(heads, 'head')} of {HEAD_SIZES[section]} numbers, as "
            f"published, {'is' if heads == 1 else 'are'} taken; --set {section}.{HEADS}=N if there are others"
        )
    return heads


def reads_qformer(shapes: Mapping[str, Shape], files: Mapping[Kind, str]) -> bool:
    """Return whether the projection reads a Q-Former's output: by its width; without a projection, by what is there.

    Args:
        shapes: Of every tensor, by its name in a full model folder.
        files: Names of the files by their kind, for the errors.

    Raises:
        WeightsError: The projection reads neither the Q-Former's output nor merged patches.
    """
    given = _QUERIES in shapes
    if _PROJECTION not in shapes:
        return given
    reads = shapes[_PROJECTION][1]
    if given and reads == shapes[_QUERIES][-1]:
        return True
    merged = _shape(shapes, f"{_EMBEDDINGS}.class_embedding", 3)[-1] * MERGED_TOKENS
    if reads == merged:
        return False
    if not given:
        raise WeightsError(
            f"the projection in {files[Kind.CHECKPOINT]} reads {reads} numbers a token, a Q-Former's output, and there "
            "is none",
            "add --qformer blip2_pretrained_flant5xxl.pth",
        )
    raise WeightsError(
        f"the projection in {files[Kind.CHECKPOINT]} reads {reads} numbers a token; the Q-Former gives "
        f"{shapes[_QUERIES][-1]}, and without it the vision encoder gives {merged}",
        _fitting(shapes.get(_TABLE, (0, 0))[-1], shapes[_QUERIES][-1]),
    )


def refuse_misfit(shapes: Mapping[str, Shape], files: Mapping[Kind, str], *, has_qformer: bool) -> None:
    """Refuse parts whose widths do not meet.

    Raises:
        WeightsError: With both widths and what would fit.
    """
    vision, text = shapes[f"{_EMBEDDINGS}.class_embedding"][-1], shapes[_TABLE][-1]
    read = shapes.get(f"{_LAYERS}.0.crossattention.attention.key.weight")
    if has_qformer and read and read[1] != vision:
        raise WeightsError(
            f"the Q-Former in {files.get(Kind.QFORMER, 'the folder')} reads {read[1]} numbers a token, "
            f"the vision encoder gives {vision}",
            "use the vision encoder that the Q-Former was trained with: eva_vit_g.pth",
        )
    if _PROJECTION in shapes and shapes[_PROJECTION][0] != text:
        made, reads = shapes[_PROJECTION]
        known = KNOWN_PROJECTIONS.get((made, reads))
        raise WeightsError(
            f"the projection in {files[Kind.CHECKPOINT]} makes {made} numbers a token"
            f"{f' for {known[1]}' if known else ''}, the language model in {files[Kind.LANGUAGE_MODEL]} reads {text}",
            _fitting(text, reads),
        )


def _fitting(text: int, reads: int) -> str:
    """Name the published checkpoint for a language model."""
    if (text, reads) in KNOWN_PROJECTIONS:
        name, model = KNOWN_PROJECTIONS[text, reads]
        return f"the checkpoint for this language model ({model}) is {name}"
    return "use the checkpoint that was trained with this language model"
