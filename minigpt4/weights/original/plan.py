"""What an import of the original's files will do, decided from names and shapes before a byte is written.

Every tensor of every file is used, known and ignored, or an error that names it; every tensor that the model needs
comes from one file. Reads no tensor, so a plan for a model of any size takes seconds.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.weights.original import names
from minigpt4.weights.original.names import Kind
from minigpt4.weights.original.sizes import (
    EVA_BLOCKS_USED,
    EVA_WIDTH,
    SECTIONS,
    Shape,
    config_values,
    depth,
    reads_qformer,
    refuse_misfit,
    refuse_untold_heads,
    unknown_override,
)

POSITIONS = "model.vision_model.embeddings.position_embedding"
PROJECTION = ("model.language_projection.weight", "model.language_projection.bias")
NORMS = ("model.vision_model.post_layernorm.weight", "model.vision_model.post_layernorm.bias")
QFORMER = ("model.qformer.", "model.query_tokens")

_LIBRARY_ERRORS = (StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError, ArithmeticError)


class Tensors(Protocol):
    """Named tensors in a file or folder; reading one costs only that one."""

    def names(self) -> Sequence[str]: ...  # noqa: D102
    def shape(self, name: str) -> Shape: ...  # noqa: D102
    def dtype(self, name: str) -> torch.dtype: ...  # noqa: D102
    def read(self, name: str) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Source:
    """One of the original's files or folders."""

    kind: Kind
    path: Path
    tensors: Tensors


@dataclass(frozen=True)
class Part:
    """A tensor in a file, and the third of a fused bias that it is; None for a whole tensor."""

    source: Source
    name: str
    third: int | None = None


@dataclass
class Plan:
    """What an import will do.

    Args:
        config: The model's configuration.
        shapes: Of every tensor to be written, by its name in a full model folder, in the model's order.
        parts: Where each comes from: one part, or the thirds of a bias whose middle is zero. Names without parts are
            new: the norm after the vision encoder, or the projection.
        ignored: Tensors that are known and not needed: file, name, reason.
        notes: Sentences for the user.
    """

    config: MiniGPT4Config
    shapes: dict[str, Shape] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    ignored: list[tuple[Path, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type a tensor will be written in: that of its file, float32 where its numbers are new."""
        parts = self.parts.get(name)
        if not parts or (name == POSITIONS and parts[0].source.tensors.shape(parts[0].name) != self.shapes[name]):
            return torch.float32
        return parts[0].source.tensors.dtype(parts[0].name)

    @property
    def num_parameters(self) -> int:
        """Numbers in the model."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def used(self) -> Counter[Path]:
        """How many tensors of each file are used."""
        return Counter(part.source.path for parts in self.parts.values() for part in parts)


def plan_import(sources: Sequence[Source], text_config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Plan:
    """Decide what an import will do; no tensor is read.

    Args:
        sources: The files, in the order in which the original loads them: a later file's tensor replaces an earlier's.
        text_config: The language model's own `config.json`.
        overrides: As `read_overrides` returns them.

    Raises:
        WeightsError: A tensor that has no place, one that is missing or of another shape, or parts that do not fit.
        ConfigError: An override that does not exist or is of the wrong type.
    """
    collected = _Collected(sources, overrides)
    shapes = {name: _joined_shape(parts) for name, parts in collected.parts.items()}
    files = {source.kind: source.path.name for source in sources}
    has_qformer = reads_qformer(shapes, files)
    if not has_qformer:
        collected.drop_qformer(shapes)
    values, notes = config_values(shapes, text_config, overrides, has_qformer=has_qformer)
    config = _config(values, overrides)
    refuse_misfit(shapes, files, has_qformer=has_qformer)
    plan = Plan(config, ignored=collected.ignored, notes=[*collected.notes, *notes])
    expected = expected_shapes(config)
    if config.tie_word_embeddings and "lm_head.weight" in collected.parts:
        collected.ignore("lm_head.weight", "the language model's head is its embedding table")
    for name, parts in collected.parts.items():
        if name not in expected:
            raise _no_place(parts[0].source, parts[0].name)
    for name, shape in expected.items():
        plan.shapes[name] = shape
        if name in collected.parts:
            _check_shape(name, collected.parts[name], shape, plan)
            plan.parts[name] = collected.parts[name]
        else:
            _check_may_be_new(name, sources, plan)
    sections = {section: getattr(config, section) for section in SECTIONS}
    widths = {section: part.hidden_size for section, part in sections.items() if part is not None}
    refuse_untold_heads(widths, text_config, overrides)
    return plan


def expected_shapes(config: MiniGPT4Config) -> dict[str, Shape]:
    """List the tensors of a model, without those that are another one's copy; nothing is allocated.

    Raises:
        ConfigError: The configuration contradicts itself: a width that the heads do not divide, for example.
    """
    try:
        with torch.device("meta"):
            model = MiniGPT4ForConditionalGeneration(config)
    except _LIBRARY_ERRORS as error:
        raise _no_model(error) from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _config(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> MiniGPT4Config:
    """Build a configuration, and refuse an override that the library would keep and never read."""
    try:
        config = MiniGPT4Config(**values)
    except _LIBRARY_ERRORS as error:
        raise _no_model(error) from error
    for key, value in overrides.items():
        if key not in SECTIONS:
            known = [*MiniGPT4Config().to_dict(), *SECTIONS]
            if key not in known:
                raise unknown_override(key, known)
        elif (part := getattr(config, key)) is not None:
            known = [f"{key}.{name}" for name in type(part)().to_dict()]
            for name in value:
                if f"{key}.{name}" not in known:
                    raise unknown_override(f"{key}.{name}", known)
    return config


def _no_model(error: Exception) -> ConfigError:
    return ConfigError(
        f"these settings make no model: {' '.join(str(error).split())[:300]}",
        "what shapes cannot tell is given by --set, for example --set qformer_config.num_attention_heads=2",
    )


class _Collected:
    """The tensors of all files by this package's names."""

    def __init__(self, sources: Sequence[Source], overrides: Mapping[str, Any]) -> None:
        self.parts: dict[str, list[Part]] = {}
        self.ignored: list[tuple[Path, str, str]] = []
        self.notes: list[str] = []
        for source in sources:
            held = depth(dict.fromkeys(source.tensors.names(), ()), "blocks")
            blocks = _num_blocks(source, held, overrides) if source.kind is Kind.VISION else held
            for name in source.tensors.names():
                self._take(source, name, blocks)
            if blocks < held:
                self.notes.append(
                    f"{source.path.name}: blocks 0 to {blocks - 1} are used, as the original does; block {held - 1} is "
                    "not"
                )

    def _take(self, source: Source, name: str, blocks: int) -> None:
        if (reason := names.why_ignored(source.kind, name)) is not None:
            self.ignored.append((source.path, name, reason))
            return
        target = names.to_ours(source.kind, name)
        if target is None:
            raise _no_place(source, name)
        if name.startswith("blocks.") and int(name.split(".")[1]) >= blocks:
            self.ignored.append((source.path, name, "the original reads the output of the block before it"))
            return
        kept = [] if target.third is None else [
            part for part in self.parts.get(target.name, []) if part.third not in (None, target.third)
        ]  # fmt: skip
        self.parts[target.name] = sorted([*kept, Part(source, name, target.third)], key=lambda part: part.third or 0)

    def ignore(self, name: str, reason: str) -> None:
        """Take a tensor out again."""
        self.ignored += [(part.source.path, part.name, reason) for part in self.parts.pop(name)]

    def drop_qformer(self, shapes: dict[str, Shape]) -> None:
        """Leave the Q-Former out for a checkpoint without one; the original loads neither its file nor its norm."""
        unused = [
            name
            for name, parts in self.parts.items()
            if name.startswith(QFORMER) or (name in NORMS and parts[0].source.kind in (Kind.QFORMER, Kind.HUB_BLIP2))
        ]
        for name in unused:
            self.ignore(name, "this model has no Q-Former, and the original does not load its file")
            del shapes[name]
        if unused:
            self.notes.append("the checkpoint is for a model without a Q-Former; the Q-Former given is left out")


def _num_blocks(source: Source, held: int, overrides: Mapping[str, Any]) -> int:
    """Return how many blocks of a vision file are used: all but the last, unless file or user say otherwise."""
    chosen = overrides.get("vision_config", {}).get("num_hidden_layers")
    if isinstance(chosen, int):
        return chosen
    if names.NUM_BLOCKS_MARK in source.tensors.names():
        return int(source.tensors.read(names.NUM_BLOCKS_MARK))
    width = source.tensors.shape("cls_token")[-1] if "cls_token" in source.tensors.names() else 0
    return EVA_BLOCKS_USED if width == EVA_WIDTH else held - 1


def _joined_shape(parts: Sequence[Part]) -> Shape:
    shape = tuple(parts[0].source.tensors.shape(parts[0].name))
    return shape if parts[0].third is None else (3 * shape[0], *shape[1:])


def _check_shape(name: str, parts: Sequence[Part], expected: Shape, plan: Plan) -> None:
    found, source = _joined_shape(parts), parts[0].source
    if parts[0].third is not None and [part.third for part in parts] != [0, 2]:
        lacking = "v_bias" if parts[0].third == 0 else "q_bias"
        raise _missing(source, f"{parts[0].name.rpartition('.')[0]}.{lacking}")
    if name == POSITIONS and found != expected and found[-1] == expected[-1]:
        before, after = (round((shape[1] - 1) ** 0.5) for shape in (found, expected))
        plan.notes.append(f"{source.path.name}: positions are interpolated from {before}x{before} to {after}x{after}")
    elif found != expected:
        raise WeightsError(
            f"tensor {parts[0].name} in {source.path.name} is {found}, expected {expected}",
            "the file is damaged or another model's, or a setting given for it does not fit",
        )


def _check_may_be_new(name: str, sources: Sequence[Source], plan: Plan) -> None:
    """Refuse a model with holes; only what the original itself initializes may be missing."""
    if name in NORMS and plan.config.qformer_config is None:
        if name == NORMS[0]:
            plan.notes.append("no file holds the norm after the vision encoder; it is 1 and 0, as in the original")
        return
    if name in PROJECTION and not any(source.kind is Kind.CHECKPOINT for source in sources):
        if name == PROJECTION[0]:
            plan.notes.append("there is no checkpoint, so the projection is new: train it before asking anything")
        return
    source = next((source for source in reversed(sources) if _is_in(name, source.kind)), None)
    if source is None:
        raise WeightsError(f"no file holds tensor {name}", "name the file that does; --help lists the options")
    raise _missing(source, names.to_original(names.NAMES[source.kind], name)[0][0])


def _is_in(name: str, kind: Kind) -> bool:
    """Return whether a file of this kind is where one would look for a tensor first."""
    if kind is Kind.CHECKPOINT:
        return name in PROJECTION
    if kind is Kind.QFORMER:
        return name in NORMS or name.startswith(QFORMER)
    return bool(names.to_original(names.NAMES[kind], name))


def _missing(source: Source, name: str) -> WeightsError:
    return WeightsError(
        f"{source.path} has no tensor {name}, which {source.kind.value} holds",
        "the download may be incomplete: fetch the file again",
    )


def _no_place(source: Source, name: str) -> WeightsError:
    return WeightsError(
        f"tensor {name} in {source.path} has no place in {source.kind.value}",
        "it may be another model's file, or a newer one than this package knows",
    )
