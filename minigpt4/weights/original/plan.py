"""What an import of the original's files will do, decided from names and shapes before a byte is written.

Every tensor of every file is used, known and ignored, or an error that names it; every tensor that the model needs
comes from one file. Reads no tensor, so a plan for a model of any size takes seconds.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.weights.original.names import (
    NAMES,
    NUM_BLOCKS_MARK,
    VISION_NAMES,
    Kind,
    to_original,
    to_ours,
    why_ignored,
)
from minigpt4.weights.original.sizes import (
    KNOWN_PROJECTIONS,
    PUBLISHED_BLOCKS,
    PUBLISHED_MERGED_TOKENS,
    PUBLISHED_VISION_WIDTH,
    Shape,
    configuration,
    depth,
    refuse_untold_heads,
)

POSITIONS = "model.vision_model.embeddings.position_embedding"
PROJECTION = "model.language_projection.weight"
PROJECTION_BIAS = "model.language_projection.bias"
QUERIES = "model.query_tokens"
NORMS = ("model.vision_model.post_layernorm.weight", "model.vision_model.post_layernorm.bias")


class Tensors(Protocol):
    """Named tensors in a file or folder; reading one costs only that one."""

    def names(self) -> Sequence[str]:
        """List the names."""

    def shape(self, name: str) -> Shape:
        """Return a tensor's shape without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type without reading it."""

    def read(self, name: str) -> Tensor:
        """Read a tensor."""


@dataclass(frozen=True)
class Source:
    """One of the original's files or folders.

    Args:
        kind: What it is.
        path: Where it lies.
        tensors: What is in it.
    """

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
        used: How many tensors of each file are used.
        ignored: Tensors that are known and not needed: file, name, reason.
        notes: Sentences for the user.
    """

    config: MiniGPT4Config
    shapes: dict[str, Shape] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    used: Counter[Path] = field(default_factory=Counter)
    ignored: list[tuple[Path, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type a tensor will be written in: that of its file, float32 where its numbers are new."""
        parts = self.parts.get(name)
        if not parts or (name == POSITIONS and parts[0].source.tensors.shape(parts[0].name) != self.shapes[name]):
            return torch.float32
        return parts[0].source.tensors.dtype(parts[0].name)

    def num_bytes(self, name: str) -> int:
        """Return how many bytes a tensor will take."""
        return int(torch.Size(self.shapes[name]).numel()) * self.dtype(name).itemsize

    @property
    def num_parameters(self) -> int:
        """Numbers in the model."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def plan_import(sources: Sequence[Source], text_config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Plan:
    """Decide what an import will do.

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
    has_qformer = _reads_qformer(shapes, sources)
    if not has_qformer:
        _drop_qformer(collected, shapes)
    config, notes = configuration(shapes, text_config, overrides, has_qformer=has_qformer)
    _refuse_misfit(shapes, sources, config)
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
    refuse_untold_heads(config, text_config, overrides)
    for parts in plan.parts.values():
        plan.used.update(part.source.path for part in parts)
    return plan


def expected_shapes(config: MiniGPT4Config) -> dict[str, Shape]:
    """List the tensors of a model, without those that are another one's copy; nothing is allocated.

    Raises:
        ConfigError: The configuration contradicts itself: a width that the heads do not divide, for example.
    """
    try:
        with torch.device("meta"):
            model = MiniGPT4ForConditionalGeneration(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ConfigError(
            f"these settings make no model: {' '.join(str(error).split())[:300]}",
            "what shapes cannot tell is given by --set, for example --set qformer_config.num_attention_heads=2",
        ) from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


class _Collected:
    """The tensors of all files under the names of this package."""

    def __init__(self, sources: Sequence[Source], overrides: Mapping[str, Any]) -> None:
        self.parts: dict[str, list[Part]] = {}
        self.ignored: list[tuple[Path, str, str]] = []
        self.notes: list[str] = []
        for source in sources:
            blocks = _num_blocks(source, overrides) if source.kind is Kind.VISION else None
            for name in source.tensors.names():
                self._take(source, name, blocks)
            if blocks is not None and blocks < depth(_bare_shapes(source), "blocks"):
                last = depth(_bare_shapes(source), "blocks") - 1
                self.notes.append(f"{source.path.name}: blocks 0 to {blocks - 1} are used, as the original does; "
                                  f"block {last} is not")  # fmt: skip

    def _take(self, source: Source, name: str, blocks: int | None) -> None:
        if (reason := why_ignored(source.kind, name)) is not None:
            self.ignored.append((source.path, name, reason))
            return
        target = to_ours(source.kind, name)
        if target is None:
            raise _no_place(source, name)
        if blocks is not None and name.startswith("blocks.") and int(name.split(".")[1]) >= blocks:
            self.ignored.append((source.path, name, "the original reads the output of the block before it"))
            return
        kept = [] if target.third is None else [
            part for part in self.parts.get(target.name, []) if part.third not in (None, target.third)
        ]  # fmt: skip
        self.parts[target.name] = sorted([*kept, Part(source, name, target.third)], key=lambda part: part.third or 0)

    def ignore(self, name: str, reason: str) -> None:
        """Take a tensor out again."""
        self.ignored += [(part.source.path, part.name, reason) for part in self.parts.pop(name)]


def _num_blocks(source: Source, overrides: Mapping[str, Any]) -> int:
    """Tell how many blocks of a vision file are used: all but the last, as of the published file's 40."""
    chosen = overrides.get("vision_config", {}).get("num_hidden_layers")
    held = depth(_bare_shapes(source), "blocks")
    if isinstance(chosen, int):
        return chosen
    if NUM_BLOCKS_MARK in source.tensors.names():
        return int(source.tensors.read(NUM_BLOCKS_MARK))
    width = _bare_shapes(source).get("cls_token", (0,))[-1]
    return PUBLISHED_BLOCKS if width == PUBLISHED_VISION_WIDTH else held - 1


def _bare_shapes(source: Source) -> dict[str, Shape]:
    return {name: tuple(source.tensors.shape(name)) for name in source.tensors.names()}


def _joined_shape(parts: Sequence[Part]) -> Shape:
    shape = tuple(parts[0].source.tensors.shape(parts[0].name))
    return shape if parts[0].third is None else (3 * shape[0], *shape[1:])


def _reads_qformer(shapes: Mapping[str, Shape], sources: Sequence[Source]) -> bool:
    """Tell whether the projection reads a Q-Former's output: by its width; without a projection, by what is there."""
    given = QUERIES in shapes
    if PROJECTION not in shapes:
        return given
    reads = shapes[PROJECTION][1]
    if given and reads == shapes[QUERIES][-1]:
        return True
    merged = shapes["model.vision_model.embeddings.class_embedding"][-1] * PUBLISHED_MERGED_TOKENS
    if reads == merged:
        return False
    checkpoint = next(source.path.name for source in sources if source.kind is Kind.CHECKPOINT)
    if not given:
        raise WeightsError(
            f"the projection in {checkpoint} reads {reads} numbers a token, a Q-Former's output, and there is none",
            "add --qformer blip2_pretrained_flant5xxl.pth",
        )
    raise WeightsError(
        f"the projection in {checkpoint} reads {reads} numbers a token; the Q-Former gives {shapes[QUERIES][-1]}, and "
        f"without it the vision encoder gives {merged}",
        _fitting(shapes.get("model.language_model.embed_tokens.weight", (0, 0))[-1], shapes[QUERIES][-1]),
    )


def _drop_qformer(collected: _Collected, shapes: dict[str, Shape]) -> None:
    """Leave the Q-Former out for a checkpoint without one; the original does not load its file, nor the norm in it."""
    unused = [
        name
        for name, parts in collected.parts.items()
        if name.startswith(("model.qformer.", QUERIES))
        or (name in NORMS and parts[0].source.kind in (Kind.QFORMER, Kind.HUB_BLIP2))
    ]
    for name in unused:
        collected.ignore(name, "this model has no Q-Former, and the original does not load its file")
        del shapes[name]
    if unused:
        collected.notes.append("the checkpoint is for a model without a Q-Former; the Q-Former given is left out")


def _refuse_misfit(shapes: Mapping[str, Shape], sources: Sequence[Source], config: MiniGPT4Config) -> None:
    """Refuse parts whose widths do not meet, with both widths and what would fit."""
    vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
    names = {source.kind: source.path.name for source in sources}
    read = shapes.get("model.qformer.encoder.layer.0.crossattention.attention.key.weight")
    if config.qformer_config is not None and read and read[1] != vision:
        raise WeightsError(
            f"the Q-Former in {names.get(Kind.QFORMER, 'the folder')} reads {read[1]} numbers a token, "
            f"the vision encoder gives {vision}",
            "use the vision encoder that the Q-Former was trained with: eva_vit_g.pth",
        )
    if PROJECTION in shapes and shapes[PROJECTION][0] != text:
        made, reads = shapes[PROJECTION]
        raise WeightsError(
            f"the projection in {names[Kind.CHECKPOINT]} makes {made} numbers a token{_made_for(made, reads)}, "
            f"the language model in {names[Kind.LANGUAGE_MODEL]} reads {text}",
            _fitting(text, reads),
        )


def _made_for(made: int, reads: int) -> str:
    known = KNOWN_PROJECTIONS.get((made, reads))
    return f" for {known[1]}" if known else ""


def _fitting(text: int, reads: int) -> str:
    """Name the published checkpoint for a language model."""
    if (text, reads) in KNOWN_PROJECTIONS:
        name, model = KNOWN_PROJECTIONS[text, reads]
        return f"the checkpoint for this language model ({model}) is {name}"
    return "use the checkpoint that was trained with this language model"


def _check_shape(name: str, parts: Sequence[Part], expected: Shape, plan: Plan) -> None:
    found = _joined_shape(parts)
    source = parts[0].source
    if parts[0].third is not None and [part.third for part in parts] != [0, 2]:
        lacking = "v_bias" if parts[0].third == 0 else "q_bias"
        raise _missing(source, f"{parts[0].name.rpartition('.')[0]}.{lacking}")
    if name == POSITIONS and found != expected and found[-1] == expected[-1]:
        before, after = (round((shape[1] - 1) ** 0.5) for shape in (found, expected))
        plan.notes.append(f"{source.path.name}: positions are interpolated from {before}x{before} to {after}x{after}")
        return
    if found != expected:
        raise WeightsError(
            f"tensor {parts[0].name} in {source.path.name} is {found}, expected {expected}",
            "the file is damaged or another model's, or a setting given for it does not fit",
        )


def _check_may_be_new(name: str, sources: Sequence[Source], plan: Plan) -> None:
    """Refuse a model with holes; only what the original itself starts anew may be missing."""
    if name in NORMS and plan.config.qformer_config is None:
        if name == NORMS[0]:
            plan.notes.append("no file holds the norm after the vision encoder; it is 1 and 0, as in the original")
        return
    if name in (PROJECTION, PROJECTION_BIAS) and not any(source.kind is Kind.CHECKPOINT for source in sources):
        if name == PROJECTION:
            plan.notes.append("there is no checkpoint, so the projection is new: train it before asking anything")
        return
    source = next((source for source in reversed(sources) if _is_in(name, source.kind)), None)
    if source is None:
        raise WeightsError(f"no file holds tensor {name}", "name the file that does; --help lists the options")
    pairs = VISION_NAMES if source.kind is Kind.VISION else NAMES[source.kind]
    raise _missing(source, to_original(pairs, name)[0][0])


def _is_in(name: str, kind: Kind) -> bool:
    """Whether a file of this kind is where one would look for a tensor first."""
    if kind is Kind.CHECKPOINT:
        return name in (PROJECTION, PROJECTION_BIAS)
    if kind is Kind.QFORMER:
        return name in NORMS or name.startswith(("model.qformer.", QUERIES))
    return bool(to_original(NAMES[kind], name))


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
