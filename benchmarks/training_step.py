"""What an update of training takes, beside the original's algorithm on the same weights, examples and machine.

    python benchmarks/training_step.py --rounds 5 --json figures.json

The projection alone learns, as in both of MiniGPT-4's stages. The original's algorithm: the picture through the frozen
vision encoder and Q-Former at every update, logits in float32 for all places, examples in batches as they come, padded
to the longest, with a mask (`original_update.py`). Then one thing after another is done as this project does it, with
`minigpt4.training` as it is from "no mask" on:

- targets only: no logits where nothing is learned.
- buckets: batches of like length, out of a window of batches.
- no mask: padding stands on the right, where no place reads it; nor is the last place read, which is only said.
- beginning once: what stands before every picture is read once for all updates.
- cached features: what the projection reads of a picture is kept, as `features: cache` in a recipe does.
- side by side: texts about one picture in one row, as `texts_per_picture` in a recipe does.
- bfloat16: the frozen parts have 16 bits, as `precision: bf16` in a recipe does; the original's algorithm so, too. Only
  where it is asked for, since a processor without AVX512-BF16 or AMX loses more by it than it gains by all the rest.

A round makes the same window of updates once in every way. The ways take turns after every update, so that a machine
that is slower for a while is so for all of them, and each turn begins with another way. The first round is not timed:
there the loss and the gradient of the window must be the same in all ways, or the program ends; and the operations of
the products of matrices are counted (attention's are not), which no other load on the machine changes. Two kinds of
examples are like MiniGPT-4's: pictures with captions of 5 to 32 tokens, and with a prompt and 50 to 160. Two have the
same answers, asked for by MiniGPT-4's template, whose system message stands before every picture. The last is like VQA:
eight short questions about each picture. Opening pictures is no part of an update here; readers do it beside.

nano's encoder is small; with `--encoder dinov2-small` one of that shape, with random weights, takes its place.
"""

import argparse
import copy
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from original_update import Batch, MaskedStep, OriginalStep, original_update
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minigpt4.data.examples import IGNORED, TextExample, padded
from minigpt4.data.order import bucketed
from minigpt4.data.packing import pack, packed_positions
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.training.objectives import Outcome, TrainingStep, language
from minigpt4.training.optimizer_step import PRECISIONS, OptimizerStep, make_optimizer
from minigpt4.training.recipe import StageRecipe
from minigpt4.weights import nano

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""How far gradients may lie apart, of their length; losses, a tenth of it, of their size."""

TINY: dict[str, Any] = {
    "vision_config": {
        "model_type": "blip_2_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "patch_size": 8, "image_size": 64, "initializer_range": 0.1,
    },
    "qformer_config": {
        "model_type": "blip_2_qformer", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 128, "cross_attention_frequency": 2, "initializer_range": 0.1,
    },
    "text_config": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 2000, "max_position_embeddings": 512,
    },
    "num_query_tokens": 32,
    "image_token_id": 3,
}  # fmt: skip

DINOV2_SMALL: dict[str, Any] = {
    "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4,
    "patch_size": 14, "image_size": 224,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What the examples of a stage are like.

    Args:
        name: Of the stage.
        batch_size: Examples an update.
        shortest: Tokens of an answer, at least.
        longest: At most.
        before: Tokens before the picture, the one that begins a text included.
        after: Tokens between the picture and the answer.
        texts: Examples about the same picture.
    """

    name: str
    batch_size: int
    shortest: int
    longest: int
    before: int
    after: int
    texts: int = 1


KINDS = [
    Kind("stage 1", 8, 5, 32, 1, 0),
    Kind("stage 2", 4, 50, 160, 8, 14),
    Kind("stage 1, template", 8, 5, 32, 43, 14),
    Kind("stage 2, template", 4, 50, 160, 43, 14),
    Kind("questions", 8, 2, 6, 1, 8, 8),
]


class EachTimeStep(TrainingStep):
    """This project's, which reads all of each text at every update."""

    def forward(self, batch: Batch) -> Outcome:
        return language(self.model, batch)


@dataclass(frozen=True)
class Way:
    """One way to make the updates of a window.

    Args:
        name: What it does besides the one before.
        step: From a batch to a loss.
        batches: The window.
        precision: Of the computation.
    """

    name: str
    step: nn.Module
    batches: Sequence[Batch]
    precision: str = "fp32"


@dataclass(frozen=True)
class Times:
    """Seconds an update, of the clock and of the processor."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Work:
    """What a way has to compute, and what comes out.

    Args:
        gflop: Billions of operations an update, of the products of matrices but for attention's.
        loss_apart: How far the loss lies from the first way's, relative to it.
        gradient_apart: How far the gradient does.
    """

    gflop: float
    loss_apart: float
    gradient_apart: float


def load(arguments: argparse.Namespace) -> MiniGPT4ForConditionalGeneration:
    """Make the model: nano's frozen parts, with another encoder if one is wanted, or random ones of a hundredth."""
    torch.manual_seed(0)
    if arguments.tiny:
        model = MiniGPT4ForConditionalGeneration(MiniGPT4Config(**TINY))
    else:
        model, _ = nano.assemble(*nano.frozen_parts())
        if arguments.encoder == "dinov2-small":
            model = with_encoder(model, DINOV2_SMALL)
    model.config.trainable_parts = ("language_projection",)
    model.freeze()
    return model.train()


def with_encoder(model: MiniGPT4ForConditionalGeneration, encoder: dict[str, Any]) -> MiniGPT4ForConditionalGeneration:
    """Put another encoder, with random weights, in the place of the model's; the language model stays."""
    settings = model.config.to_dict()
    settings["vision_config"] = encoder
    settings["qformer_config"]["encoder_hidden_size"] = encoder["hidden_size"]
    other = MiniGPT4ForConditionalGeneration(MiniGPT4Config(**settings))
    other.model.language_model = model.model.language_model
    other.lm_head = model.lm_head
    return other


def examples(model: MiniGPT4ForConditionalGeneration, kind: Kind, count: int) -> tuple[list[TextExample], Tensor]:
    """Make texts and pictures up: what a token is takes no time of its own, how many there are does."""
    generator = torch.Generator().manual_seed(7)
    config = model.config

    def words(number: int) -> list[int]:
        ids = torch.randint(config.image_token_id + 1, config.text_config.vocab_size, (number,), generator=generator)
        return [int(i) for i in ids]

    beginning = [*words(kind.before), *[config.image_token_id] * config.num_image_tokens]
    lengths = torch.randint(kind.shortest, kind.longest + 1, (count,), generator=generator).tolist()
    texts = []
    for length in lengths:
        prompt, answer = beginning + words(kind.after), words(length)
        texts.append(TextExample(prompt + answer, [IGNORED] * len(prompt) + answer, 0))
    side = config.vision_config.image_size
    pictures = torch.randn(count // kind.texts, 3, side, side, generator=generator)
    return texts, pictures.repeat_interleave(kind.texts, 0)


def ways(model: MiniGPT4ForConditionalGeneration, kind: Kind, window: int, *, bfloat16: bool) -> list[Way]:
    """List the ways, from the original's to this project's."""
    texts, pictures = examples(model, kind, kind.batch_size * window)
    in_order = [list(range(first, first + kind.batch_size)) for first in range(0, len(texts), kind.batch_size)]
    alike = bucketed([len(text.input_ids) for text in texts], kind.batch_size, (0,))
    with torch.no_grad():
        features = torch.cat([qformer_outputs(model, pictures[rows]) for rows in in_order])

    def batches(groups: list[list[int]], **more: Tensor) -> list[Batch]:
        return [
            padded([texts[i] for i in rows], 0) | {name: value[rows] for name, value in more.items()} for rows in groups
        ]

    as_they_come, bucketed_ = batches(in_order, pixel_values=pictures), batches(alike, pixel_values=pictures)
    ours = TrainingStep(model)
    listed = [
        Way("the original's algorithm", OriginalStep(model), as_they_come),
        Way("+ targets only", MaskedStep(model), as_they_come),
        Way("+ buckets", MaskedStep(model), bucketed_),
        Way("+ no mask", EachTimeStep(model), bucketed_),
        Way("+ beginning once", ours, bucketed_),
        Way("+ cached features", ours, batches(alike, qformer_outputs=features)),
    ]
    if kind.texts > 1:
        listed.append(Way("+ side by side", ours, joined(model, kind, texts, in_order, features)))
    if bfloat16:
        other = in_bfloat16(model)
        kept = [batch | {"qformer_outputs": batch["qformer_outputs"].bfloat16()} for batch in listed[-1].batches]
        listed.append(Way("+ bfloat16", TrainingStep(other), kept, "bf16"))
        listed.append(Way("the original's, in bfloat16", OriginalStep(other), as_they_come, "bf16"))
    return listed


def in_bfloat16(model: MiniGPT4ForConditionalGeneration) -> MiniGPT4ForConditionalGeneration:
    """Return a copy with half the bits, but for what learns."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return other


def joined(
    model: MiniGPT4ForConditionalGeneration,
    kind: Kind,
    texts: Sequence[TextExample],
    groups: list[list[int]],
    features: Tensor,
) -> list[Batch]:
    """Make batches in which the texts about a picture stand in one row."""
    made = []
    for rows in groups:
        firsts = rows[:: kind.texts]
        together = [pack(texts[i : i + kind.texts], model.config.image_token_id) for i in firsts]
        made.append(padded(together, 0) | packed_positions(together) | {"qformer_outputs": features[firsts]})
    return made


def qformer_outputs(model: MiniGPT4ForConditionalGeneration, pictures: Tensor) -> Tensor:
    """Return what the projection reads."""
    read: list[Tensor] = []
    hook = model.model.language_projection.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model.get_image_features(pictures, return_dict=True)
    hook.remove()
    return read[0].clone()


def make_updater(way: Way, kind: Kind) -> OptimizerStep:
    stage = StageRecipe(
        name=kind.name, steps=1, batch_size=kind.batch_size, learning_rate=1e-4, clip_norm=None, loss_over="tokens"
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return OptimizerStep(
        way.step, make_optimizer(way.step, stage), scaler, stage, PRECISIONS[way.precision], PartialState()
    )


def compare(all_ways: Sequence[Way], kind: Kind) -> dict[str, Work]:
    """Take loss and gradient of the whole window in every way."""
    found: dict[str, Work] = {}
    first: tuple[float, Tensor] | None = None
    for way in all_ways:
        updater = make_updater(way, kind)
        with FlopCounterMode(display=False) as counter:
            figures = updater(way.batches, rate=0.0)  # the weights stay as they are
        gradient = torch.cat([p.grad.flatten() for p in way.step.parameters() if p.grad is not None])
        first = first or (figures.loss, gradient)
        loss_apart = abs(figures.loss / first[0] - 1)
        gradient_apart = float((gradient - first[1]).norm() / first[1].norm())
        most = TOLERANCE[way.precision]
        assert loss_apart < most / 10, f"{way.name}: the loss differs: {loss_apart}"
        assert gradient_apart < most, f"{way.name}: the gradient differs: {gradient_apart}"
        found[way.name] = Work(counter.get_total_flops() / len(way.batches) / 1e9, loss_apart, gradient_apart)
    return found


def timed(all_ways: Sequence[Way], kind: Kind, number: int) -> dict[str, Times]:
    """Make the updates of the window in every way, in turns; the weights stay as they are."""
    updates = {way.name: update_of(way, kind) for way in all_ways}
    total = {way.name: Times(0, 0) for way in all_ways}
    length = len(all_ways[0].batches)
    for at in range(length):
        first = (number * length + at) % len(all_ways)
        for way in [*all_ways[first:], *all_ways[:first]]:
            wall, cpu = time.perf_counter(), time.process_time()
            updates[way.name](way.batches[at])
            taken, before = (time.perf_counter() - wall, time.process_time() - cpu), total[way.name]
            total[way.name] = Times(before.wall + taken[0] / length, before.cpu + taken[1] / length)
    return total


def update_of(way: Way, kind: Kind) -> Callable[[Batch], object]:
    """Return the update that a way makes of a batch."""
    updater = make_updater(way, kind)
    if not isinstance(way.step, OriginalStep):
        return lambda batch: updater([batch], rate=0.0)
    for group in updater.optimizer.param_groups:
        group["lr"] = 0.0
    return original_update(way.step, updater.optimizer, PRECISIONS[way.precision])


def measure(model: MiniGPT4ForConditionalGeneration, kind: Kind, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one kind of examples."""
    all_ways = ways(model, kind, arguments.window, bfloat16=arguments.bfloat16)
    work = compare(all_ways, kind)
    times: dict[str, list[Times]] = {way.name: [] for way in all_ways}
    for number in range(arguments.rounds):
        for name, taken in timed(all_ways, kind, number).items():
            times[name].append(taken)
            print(f"{kind.name}, round {number + 1}: {name:25} {taken}", file=sys.stderr, flush=True)
    return {
        name: {
            "wall": statistics.median(t.wall for t in times[name]),
            "cpu": statistics.median(t.cpu for t in times[name]),
            **asdict(work[name]),
        }
        for name in times
    }


def table(figures: Mapping[str, Mapping[str, float]], kind: Kind) -> str:
    """Write the medians and their ratios as Markdown."""
    lines = [
        f"| {kind.name}: batches of {kind.batch_size}, answers of {kind.shortest} to {kind.longest} tokens "
        "| s an update | processor s | Gflop | ratio | of processor s | of Gflop | loss apart | gradient apart |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(figures.values()))
    for name, row in figures.items():
        ratios = " | ".join(f"{first[key] / row[key]:.2f}" for key in ("wall", "cpu", "gflop"))
        lines.append(
            f"| {name} | {row['wall']:.3f} | {row['cpu']:.3f} | {row['gflop']:.3g} | {ratios} "
            f"| {row['loss_apart']:.0e} | {row['gradient_apart']:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model of a hundredth of nano's size")
    parser.add_argument(
        "--encoder", choices=["nano", "dinov2-small"], default="nano", help="nano's own, or one of DINOv2-small's shape"
    )
    names = [kind.name for kind in KINDS]
    parser.add_argument("--kinds", nargs="+", choices=names, default=names, help="of examples")
    parser.add_argument("--bfloat16", action="store_true", help="two more ways, for a processor that computes in it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=int, default=8, help="updates in a round, and batches in a bucket's window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load(arguments)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} used, torch {torch.__version__}"
    figures: dict[str, Any] = {
        "machine": machine,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    kinds = [kind for kind in KINDS if kind.name in arguments.kinds]
    for kind in kinds:
        figures[kind.name] = measure(model, kind, arguments)
    figures["load_after"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print("\n\n".join(table(figures[kind.name], kind) for kind in kinds))
    busy = f"{figures['load_before']:.1f} before, {figures['load_after']:.1f} after; " if figures["load_before"] else ""
    print(f"\n{machine}; load {busy}{figures['date']}; `{figures['command']}`")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
