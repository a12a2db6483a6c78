"""What cached features save: reading and learning from pictures that are opened and seen each time, or were once.

    python benchmarks/training_features.py --rounds 5 --json figures.json

One recipe, twice: `features: compute` opens each picture and lets the frozen parts look at it at every update,
`features: cache` reads from the disk what they saw. The projection alone learns (`--trainable query_tokens` or
`qformer`: what the vision encoder says is kept instead). Both ways make the same updates in turn, in one process
without readers beside it, and begin alternately; the first round is not timed. There the losses of both must be the
same.

The pictures are drawn scenes, JPEG of 640 x 480. The time to fill the store stands below the table, and after how many
times through the pictures it is paid back. A table in seconds of the processor is safe from what else the machine does.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from minigpt4.training.features import cached_pictures
from minigpt4.training.model_setup import Prepared, prepare_model
from minigpt4.training.objectives import TrainingStep
from minigpt4.training.optimizer_step import PRECISIONS, OptimizerStep, make_optimizer
from minigpt4.training.processes import processes
from minigpt4.training.recipe import Recipe
from minigpt4.training.stage_data import stage_data
from nano.scenes.drawing import caption, draw_scene

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""How far losses may lie apart, of their size."""


@dataclass
class Way:
    """One way to get at the pictures, and the seconds of the processor and of the clock that its rounds took."""

    name: str
    data: Dataset[dict[str, Any]]
    reading: list[float] = field(default_factory=list)
    updating: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, *, wall: bool = False) -> float:
        """Seconds an update, reading included: the median round."""
        cpu = [read + update for read, update in zip(self.reading, self.updating, strict=True)]
        return statistics.median(self.wall if wall else cpu)


def draw_pictures(folder: Path, count: int) -> None:
    """Write scenes with their captions beside them."""
    for number in range(count):
        picture, scene = draw_scene(np.random.default_rng([7, number]))
        resized = picture.resize((640, 480), Image.Resampling.BICUBIC)
        resized.save(folder / f"{number:05}.jpg", quality=90)
        (folder / f"{number:05}.txt").write_text(f"{caption(scene)}.", encoding="utf-8")


def make_recipe(folder: Path, arguments: argparse.Namespace) -> Recipe:
    """Return the recipe of both ways."""
    stage = {
        "name": "features", "steps": arguments.updates, "batch_size": arguments.batch_size, "learning_rate": 1e-3,
        "bucket_batches": 1,
    }  # fmt: skip
    content = {
        "model": arguments.model, "joining_parts": "new", "trainable": ["language_projection", *arguments.trainable],
        "output": str(folder / "run"), "precision": arguments.precision, "workers": 0, "features": "cache",
        "data": {"sources": [{"path": str(folder / "pictures")}], "crop": False}, "stages": [stage],
    }  # fmt: skip
    return Recipe.model_validate(content)


def play(way: Way, prepared: Prepared, recipe: Recipe, rate: float) -> None:
    """Make the updates of a round; afterwards the weights are what they were."""
    stage = recipe.stages[0]
    module = TrainingStep(prepared.model, stage.objective)
    before = [p.detach().clone() for p in module.parameters() if p.requires_grad]
    precision = PRECISIONS[recipe.precision]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    updater = OptimizerStep(module, make_optimizer(module, stage), scaler, stage, precision, processes())
    reading = updating = 0.0
    began = time.perf_counter()
    way.losses = []
    for number in range(stage.steps):
        start = time.process_time()
        batch = way.data[number]
        read = time.process_time()
        way.losses.append(updater([batch], rate).loss)
        reading, updating = reading + read - start, updating + time.process_time() - read
    for values, wanted in ((way.wall, time.perf_counter() - began), (way.reading, reading), (way.updating, updating)):
        values.append(wanted / stage.steps)
    with torch.no_grad():
        for parameter, value in zip((p for p in module.parameters() if p.requires_grad), before, strict=True):
            parameter.copy_(value)


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how many seconds of the processor something takes, and what it returns."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], list[Way]]:
    """Fill a store, then play both ways in turn."""
    (folder / "pictures").mkdir()
    draw_pictures(folder / "pictures", arguments.updates * arguments.batch_size)
    recipe = make_recipe(folder, arguments)
    prepared = prepare_model(recipe, processes())
    os.environ["MINIGPT4_HOME"] = str(folder)  # a store of its own, empty
    filling, kept = cpu_seconds(lambda: cached_pictures(recipe, prepared, processes()))
    ways = [
        Way("compute", stage_data(recipe, prepared, processes())(0, recipe.stages[0])),
        Way("cache", stage_data(recipe, prepared, processes(), kept)(0, recipe.stages[0])),
    ]
    prepared.model.train()
    for round_ in range(arguments.rounds + 1):
        for way in ways if round_ % 2 else reversed(ways):
            # Adam makes steps of one size out of gradients that differ by rounding alone: losses are compared without.
            play(way, prepared, recipe, recipe.stages[0].learning_rate if round_ else 0.0)
        if round_ == 0:
            check_losses(ways, TOLERANCE[recipe.precision])
            for way in ways:
                way.reading, way.updating, way.wall = [], [], []
    stored = sum(path.stat().st_size for path in kept.store.folder.glob("*.safetensors"))
    figures = {"kind": kept.kind, "filling_seconds": filling, "pictures": len(kept.store), "stored_bytes": stored}
    return figures, ways


def check_losses(ways: list[Way], tolerance: float) -> None:
    """End the program if the ways do not learn the same."""
    for number, (one, other) in enumerate(zip(ways[0].losses, ways[1].losses, strict=True)):
        if abs(one - other) > tolerance * abs(one):
            sys.exit(f"update {number}: the loss is {one} with pictures and {other} with their features")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="nano or a model folder")
    parser.add_argument("--trainable", nargs="*", default=[], choices=["query_tokens", "qformer"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        figures, ways = measure(arguments, Path(folder))
    compute, cache = ways
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch "
          f"{torch.__version__}, {arguments.threads} threads: {shlex.join(['python', *sys.argv])}\n")  # fmt: skip
    print("| pictures | reading s | update s | s an update | pictures/s | wall s an update | ratio |")
    print("|---|---|---|---|---|---|---|")
    rows = {}
    for way in ways:
        row = {
            "reading": statistics.median(way.reading), "updating": statistics.median(way.updating),
            "step": way.step(), "pictures_per_second": arguments.batch_size / way.step(),
            "wall": way.step(wall=True), "ratio": compute.step() / way.step(),
        }  # fmt: skip
        rows[way.name] = row
        print(f"| {way.name} | {' | '.join(f'{value:.3g}' for value in row.values())} |")
    each, size = (figures[name] / figures["pictures"] for name in ("filling_seconds", "stored_bytes"))
    saved = (compute.step() - cache.step()) / arguments.batch_size
    print(f"\nkept: {figures['kind']}, {size / 1e3:.1f} kB a picture; filled at {1 / each:.1f} pictures/s, "
          f"paid back after {each / saved:.1f} times through")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "ways": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
