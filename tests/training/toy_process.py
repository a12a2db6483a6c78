"""A toy run as a program of its own, alone or under torchrun; `python -m tests.training.toy_process --help`.

Writes `final.safetensors` (all trained tensors) into the run's folder when it ends.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.utils.data import Dataset

from minigpt4.cli import ending_at_once
from minigpt4.training.checkpoint import trained_tensors
from minigpt4.training.loop import Progress, train
from minigpt4.training.processes import joined
from minigpt4.training.recipe import Recipe, StageRecipe
from minigpt4.training.run_folder import check_recipe, only_run
from tests.training import toy


class Part(Dataset[dict[str, Any]]):
    """A process's rows of the toy batches."""

    def __init__(self, number: int, stage: StageRecipe, rank: int, world_size: int) -> None:
        self.whole = toy.ToyBatches(number, stage)
        self.rows = slice(rank, None, world_size)

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, item: int) -> dict[str, Any]:
        batch = self.whole[item]
        seen = batch["vision_outputs"]
        batch["vision_outputs"] = type(seen)(**{key: value[self.rows] for key, value in seen.items()})
        for key in ("input_ids", "attention_mask", "labels", "keys"):
            if key in batch:
                batch[key] = batch[key][self.rows]
        return batch


def recipe(arguments: argparse.Namespace) -> Recipe:
    stages = [
        {"name": name, "batch_size": 4, "learning_rate": 0.01, "steps": arguments.steps,
         "warmup_steps": 1, "threads": 1, "accumulation": arguments.accumulation}
        for name in ("first", "second")
    ]  # fmt: skip
    changes = {
        "checkpoint_steps": arguments.checkpoint_steps,
        "workers": arguments.workers,
        "parallel": arguments.parallel,
        "stages": stages,
    }
    return toy.recipe(arguments.output, **changes)


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    with joined() as here:
        run_in(here, arguments)


def run_in(here: PartialState, arguments: argparse.Namespace) -> None:
    wanted = recipe(arguments)

    class Killer(toy.Watcher):
        def on_update(self, progress: Progress) -> None:
            super().on_update(progress)
            if len(self.steps) == arguments.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)

    toy.DROPOUT = arguments.dropout
    model = toy.model()
    if here.is_main_process:
        with only_run(wanted.output):
            check_recipe(wanted, here.num_processes, force=False)
    if here.process_index == arguments.die_rank:

        def die(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        model.model.language_projection.register_forward_hook(die)

    def part(number: int, stage: StageRecipe) -> Part:
        return Part(number, stage, here.process_index, here.num_processes)

    train(wanted, model, part, Killer(), here)
    tensors = trained_tensors(model)
    if here.is_main_process:
        save_file(tensors, arguments.output / "final.safetensors")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--parallel", default="ddp")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpoint-steps", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--kill-after", type=int, default=0)
    parser.add_argument("--die-rank", type=int, default=-1)
    return parser.parse_args(words)


if __name__ == "__main__":
    with ending_at_once():  # as the command line does
        run(parsed())
