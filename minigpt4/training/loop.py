"""The training loop: stage after stage, step after step, over the parts that learn.

Knows neither what the examples are nor what the objective is, and prints nothing: what happens is told to `report`.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from minigpt4.errors import DataError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.checkpoint import (
    Position,
    load_optimizer,
    load_position,
    load_trained,
    save_checkpoint,
)
from minigpt4.training.objectives import OBJECTIVES
from minigpt4.training.recipe import Recipe, StageRecipe
from minigpt4.weights.files.atomic import write_file

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Progress:
    """One step, as told to whoever watches.

    Args:
        stage: The stage's name.
        step: Steps done in it.
        steps: Steps in it.
        loss: The step's loss.
        learning_rate: Its learning rate.
        seconds: It took so long, loading included.
        accuracy: The objective's share of hits.
    """

    stage: str
    step: int
    steps: int
    loss: float
    learning_rate: float
    seconds: float
    accuracy: float


def learning_rate(stage: StageRecipe, step: int) -> float:
    """Rise linearly over `warmup_steps`, then fall along a cosine to `final_learning_rate`."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(stage.steps - stage.warmup_steps, 1)
    return stage.final_learning_rate + (stage.learning_rate - stage.final_learning_rate) * 0.5 * (
        1 + math.cos(math.pi * done)
    )


def make_optimizer(model: MiniGPT4ForConditionalGeneration, stage: StageRecipe) -> torch.optim.AdamW:
    """AdamW over what learns; vectors are not decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": stage.weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=stage.learning_rate,
        betas=(0.9, 0.98),
    )


def train(
    recipe: Recipe,
    model: MiniGPT4ForConditionalGeneration,
    batches: Callable[[int, StageRecipe], Dataset[dict[str, Any]]],
    report: Callable[[Progress], None],
) -> None:
    """Train the model in place, going on where an earlier run in `recipe.output` stopped.

    Args:
        recipe: What to do.
        model: The model; only its trainable parameters change.
        batches: Number and recipe of a stage to the data set of its batches, one a step.
        report: Told of every step.

    Raises:
        DataError: The loss is not a number.
    """
    recipe.output.mkdir(parents=True, exist_ok=True)
    position = load_position(recipe.output)
    if position is not None:
        load_trained(recipe.output, model)
    start = position or Position(stage=0, step=0)
    _forget_metrics_after(recipe, start)
    model.train()
    for number, stage in enumerate(recipe.stages[start.stage :], start.stage):
        first = start.step if number == start.stage else 0
        optimizer = make_optimizer(model, stage)
        if first:
            load_optimizer(recipe.output, model, optimizer)
        _train_stage(recipe, number, first, model, optimizer, batches(number, stage), report)
    model.eval()


def _forget_metrics_after(recipe: Recipe, position: Position) -> None:
    """Drop the figures of steps that will be taken again, and a last line that was cut off."""
    path = metrics_path(recipe.output)
    if not path.exists():
        return
    numbers = {stage.name: number for number, stage in enumerate(recipe.stages)}
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        figures = json.loads(line)
        if (numbers[figures["stage"]], figures["step"]) <= (position.stage, position.step):
            kept.append(line)
    with write_file(path, "w") as file:
        file.writelines(kept)


def _train_stage(
    recipe: Recipe,
    number: int,
    first: int,
    model: MiniGPT4ForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    data: Dataset[dict[str, Any]],
    report: Callable[[Progress], None],
) -> None:
    stage = recipe.stages[number]
    torch.set_num_threads(stage.threads)
    loader = DataLoader(
        Subset(data, range(first, stage.steps)),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=recipe.workers,
        prefetch_factor=4 if recipe.workers else None,
        worker_init_fn=_one_thread,
    )
    started = time.monotonic()
    for step, batch in enumerate(loader, first):
        rate = learning_rate(stage, step)
        loss, accuracy = _step(stage, model, optimizer, batch, rate)
        if not math.isfinite(loss):
            raise DataError(f"the loss of stage {stage.name} is {loss} at step {step}", hint="lower the learning rate")
        now = time.monotonic()
        progress = Progress(stage.name, step + 1, stage.steps, loss, rate, now - started, accuracy)
        started = now
        with metrics_path(recipe.output).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(progress)) + "\n")
        report(progress)
        if (step + 1) % recipe.checkpoint_steps == 0 and step + 1 < stage.steps:
            save_checkpoint(recipe.output, model, optimizer, Position(number, step + 1))
    save_checkpoint(recipe.output, model, optimizer, Position(number + 1, 0))


def _step(
    stage: StageRecipe,
    model: MiniGPT4ForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    rate: float,
) -> tuple[float, float]:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss, figures = OBJECTIVES[stage.objective](model, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], stage.clip_norm)
    optimizer.step()
    return loss.item(), next(iter(figures.values()))


def _one_thread(worker: int) -> None:
    """Leave the other core to the trainer."""
    torch.set_num_threads(1)


def _as_it_is(batch: Any) -> Any:  # noqa: ANN401  (whatever a data set makes)
    """A batch comes whole from the data set."""
    return batch


def metrics_path(output: Path) -> Path:
    """Where a run's figures lie, one JSON object a step."""
    return output / METRICS_FILE
