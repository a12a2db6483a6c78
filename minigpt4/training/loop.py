"""The training loop: stage after stage, update after update, over the trainable parts.

Knows neither examples nor objectives, and prints nothing: `Callbacks` are called. Killed at any moment and started
again, a run ends with the same numbers to the bit: data and random numbers are functions of seed, stage and step, and
everything else is in the last checkpoint.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset, Subset

from minigpt4.errors import DataError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.text import counted
from minigpt4.training.checkpoint import (
    State,
    check_finite,
    last_checkpoint,
    load_optimizer,
    load_trained,
    mark_best,
    name_of,
    optimizer_tensors,
    remove_old,
    trained_tensors,
    write_checkpoint,
)
from minigpt4.training.data_loader import BadSamples, StopRequest, read_ahead, stop_requests, workers_alive
from minigpt4.training.objectives import Objective, TrainingStep
from minigpt4.training.optimizer_step import (
    PRECISIONS,
    Figures,
    OptimizerStep,
    chosen_precision,
    make_optimizer,
    memory_for,
)
from minigpt4.training.processes import by_the_main_process, others_alive, spread
from minigpt4.training.recipe import Recipe, StageRecipe
from minigpt4.training.run_folder import (
    CHECKPOINT_FOLDER,
    append_line,
    flush_lines,
    forget_lines_after,
    metrics_path,
    resumable,
)
from minigpt4.training.schedule import batches_before, learning_rate, num_batches
from minigpt4.weights.files.disk import make_folder

Batches = Callable[[int, StageRecipe], Dataset[dict[str, Any]]]
"""From number and recipe of a stage to its data set: a process's batches, `accumulation` of them an update."""

BATCHES_AHEAD = 4
"""Batches that each worker has ready."""
_LESS_MEMORY = "a smaller batch_size with as much more accumulation, gradient_checkpointing: true, or quantize: nf4"


@dataclass(frozen=True)
class Progress:
    """One update, and its line of `metrics.jsonl`.

    Args:
        stage: The stage's name.
        step: Updates made in it.
        steps: Updates of it.
        loss: Of the update.
        accuracy: Share of targets that are the likeliest token.
        learning_rate: Of the update.
        grad_norm: Of all gradients together, before clipping.
        tokens: Targets, over all processes.
        images: Pictures, over all processes.
        seconds: Duration with loading, without validation and checkpoint.
        skipped: The weights stayed as they were, since the loss or a gradient is not a number.
        memory_bytes: The largest use so far, of the accelerator if there is one.
    """

    stage: str
    step: int
    steps: int
    loss: float
    accuracy: float
    learning_rate: float
    grad_norm: float
    tokens: int
    images: int
    seconds: float
    skipped: bool
    memory_bytes: int


class Callbacks:
    """Called by `train`; the methods do nothing until a subclass overrides them."""

    def on_resume(self, state: State) -> None:
        """Called once, in all processes, when a run continues from a checkpoint."""

    def on_update(self, progress: Progress) -> None:
        """Called after every update, in the main process."""

    def on_validation(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        """Called after every update, in all processes; returns the validation loss if one is due."""
        return None

    def on_stop_request(self) -> None:
        """Called after the signal that asks to stop, in another thread of the process that got it."""


@dataclass
class _Run:
    recipe: Recipe
    model: MiniGPT4ForConditionalGeneration
    step: TrainingStep
    module: torch.nn.Module
    processes: PartialState
    callbacks: Callbacks
    stop: StopRequest
    state: State
    objectives: Mapping[str, Objective]


def train(
    recipe: Recipe,
    model: MiniGPT4ForConditionalGeneration,
    batches: Batches,
    callbacks: Callbacks,
    processes: PartialState,
    objectives: Mapping[str, Objective] | None = None,
) -> None:
    """Train a model in place, continuing where an earlier run in `recipe.output` stopped.

    Args:
        recipe: The recipe.
        model: The model, on its device; only its trainable parameters change.
        batches: Makes a stage's data set.
        callbacks: Called while it trains.
        processes: The processes of the run.
        objectives: By the names of stages that have another objective than `language`.

    Raises:
        ConfigError: There is not enough memory for an update.
        DataError: The loss stays no number, a trained number became none, the data is too bad, or a worker ended.
        MiniGPT4Error: Another process of the run ended.
        StorageError: The run's folder cannot be written.
        WeightsError: All checkpoints are damaged, or of another model.
    """
    found = last_checkpoint(recipe.output)
    if found:
        load_trained(found[0], model)
        callbacks.on_resume(found[1])
    state = found[1] if found else State()
    step = TrainingStep(model)
    model.train()
    with (
        resumable(), stop_requests(callbacks.on_stop_request) as stop, others_alive(processes), workers_alive(),
    ):  # fmt: skip
        by_the_main_process(lambda: _rewind(recipe, state), processes)
        module = spread(step, recipe.parallel, processes)
        run = _Run(recipe, model, step, module, processes, callbacks, stop, state, objectives or {})
        for number in range(state.stage, len(recipe.stages)):
            _train_stage(run, number, batches, found[0] if found and state.step else None)
    model.eval()


def _rewind(recipe: Recipe, state: State) -> None:
    """Bring what lies beside the checkpoints back to the state of the one that is continued from."""
    forget_lines_after(recipe, state.stage, state.step)
    if state.best is not None and (recipe.output / CHECKPOINT_FOLDER / state.best).exists():
        mark_best(recipe.output, state.best)


def _train_stage(run: _Run, number: int, batches: Batches, checkpoint: Path | None) -> None:
    stage = run.recipe.stages[number]
    first = run.state.step
    if stage.threads:
        torch.set_num_threads(stage.threads)
    run.step.objective = run.objectives.get(stage.name)
    precision = PRECISIONS[chosen_precision(run.recipe, run.processes.device)]
    scaler = torch.amp.GradScaler(run.processes.device.type, enabled=precision is torch.float16)
    optimize = OptimizerStep(run.module, make_optimizer(run.module, stage), scaler, stage, precision, run.processes)
    if first and checkpoint is not None:
        load_optimizer(checkpoint, run.model, optimize.optimizer)
        scaler.load_state_dict(run.state.scaler)
    bad_samples = BadSamples(run.recipe, run.processes, run.state)
    data = Subset(batches(number, stage), range(batches_before(stage, first), batches_before(stage, stage.steps)))
    started = time.monotonic()
    best = False
    with closing(read_ahead(data, run.recipe.workers, ahead=BATCHES_AHEAD)) as batches_read:
        for at, group in enumerate(_groups(batches_read, stage, first), first):
            _seed(run, at)
            rate = learning_rate(stage, at)
            with memory_for(f"an update of stage {stage.name}, {stage.batch_size:,} examples at once", _LESS_MEMORY):
                figures = optimize(group, rate, stop=run.stop.signal is not None)
            progress = _progress(stage, at, rate, figures, time.monotonic() - started)
            run.state.step = at + 1
            run.state.scaler = scaler.state_dict()
            by_the_main_process(lambda: _report(run, progress), run.processes)  # noqa: B023  (called at once)
            bad_samples.add(stage.name, at + 1, group)
            _count_skipped(run, stage, group, figures)
            best = _after_update(run, optimize.optimizer, stage, figures)
            started = time.monotonic()  # validation and checkpoint are no part of an update's seconds
    run.state.stage, run.state.step = number + 1, 0
    run.state.best_loss = None  # the next stage's is another loss, of other texts
    _save(run, None, best=best)


def _groups(batches: Iterator[dict[str, Any]], stage: StageRecipe, first: int) -> Iterator[list[dict[str, Any]]]:
    """Collect the batches of each update."""
    for step in range(first, stage.steps):
        yield list(itertools.islice(batches, num_batches(stage, step)))


def _after_update(run: _Run, optimizer: torch.optim.Optimizer, stage: StageRecipe, figures: Figures) -> bool:
    """Validate, save and stop if it is time for it; returns whether the validation loss is the smallest so far."""
    done = run.state.step
    with memory_for(f"a validation of stage {stage.name}", _LESS_MEMORY):
        loss = run.callbacks.on_validation(run.step, stage, done)
    best = loss is not None and math.isfinite(loss) and (run.state.best_loss is None or loss < run.state.best_loss)
    if best:
        run.state.best_loss = loss
    if loss is not None:
        line = {"stage": stage.name, "step": done, "validation_loss": loss}
        by_the_main_process(lambda: append_line(metrics_path(run.recipe.output), line), run.processes)
    if done < stage.steps and (best or figures.stop or done % run.recipe.checkpoint_steps == 0):
        _save(run, optimizer, best=best)
    if figures.stop and done < stage.steps:
        run.stop.obey()
    return best


def _save(run: _Run, optimizer: torch.optim.Optimizer | None, *, best: bool = False) -> None:
    """Write a checkpoint: all processes gather, the main one writes."""
    tensors = trained_tensors(run.model)
    moments = optimizer_tensors(run.model, optimizer) if optimizer else {}
    check_finite(tensors, moments, run.recipe, run.state)
    if best:
        run.state.best = name_of(run.state)

    def write() -> None:
        output = run.recipe.output
        make_folder(output / CHECKPOINT_FOLDER)
        flush_lines(output)
        folder = write_checkpoint(output, tensors, moments, run.state)
        if best:
            mark_best(output, folder.name)
        remove_old(output, run.state, run.recipe.keep_checkpoints)

    by_the_main_process(write, run.processes)


def _report(run: _Run, progress: Progress) -> None:
    append_line(metrics_path(run.recipe.output), asdict(progress))
    run.callbacks.on_update(progress)


def _count_skipped(run: _Run, stage: StageRecipe, group: list[dict[str, Any]], figures: Figures) -> None:
    """Stop a run whose loss stays no number, and list the examples it was computed from in its folder."""
    if figures.rescaled:
        return
    if figures.skipped:
        check_finite(trained_tensors(run.model), {}, run.recipe, run.state)  # else the examples would be blamed
    run.state.skipped = run.state.skipped + 1 if figures.skipped else 0
    if run.state.skipped <= run.recipe.max_skipped_steps:
        return
    keys = [key for batch in group for key in batch.get("keys", [])]
    line = {"stage": stage.name, "step": run.state.step, "loss": str(figures.loss), "keys": keys}
    path = run.recipe.output / "not_a_number.jsonl"
    by_the_main_process(lambda: append_line(path, line), run.processes)
    raise DataError(
        f"the loss of stage {stage.name} is {figures.loss} and the gradient's norm {figures.grad_norm}, "
        f"{counted(run.state.skipped, 'update')} in a row, the last at step {run.state.step}",
        hint=f"lower the learning rate, or look at the examples that {path} names",
    )


def _seed(run: _Run, at: int) -> None:
    """Set the random numbers of an update (dropout), which are its own in every process."""
    mixed = 0
    for number in (run.recipe.seed, run.state.stage, at, run.processes.process_index):
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 1) % (1 << 63)
    torch.manual_seed(mixed)


def _progress(stage: StageRecipe, at: int, rate: float, figures: Figures, seconds: float) -> Progress:
    return Progress(
        stage=stage.name,
        step=at + 1,
        steps=stage.steps,
        loss=figures.loss,
        accuracy=figures.accuracy,
        learning_rate=rate,
        grad_norm=figures.grad_norm,
        tokens=figures.tokens,
        images=figures.images,
        seconds=seconds,
        skipped=figures.skipped,
        memory_bytes=_peak_memory(),
    )


def _peak_memory() -> int:
    """Return the largest use so far in bytes, of the accelerator if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil  # type: ignore[import-untyped]

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
