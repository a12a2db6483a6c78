"""The training loop: stage after stage, update after update, over the parts that learn.

Knows neither what the examples are nor what the objective is, and prints nothing: what happens is told to `Observer`.
Killed at any moment and started again, a run ends with the same numbers to the bit: data and random numbers are
functions of seed, stage and step, and everything else is in the last checkpoint.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from torch.utils.data import Dataset, Subset

from minigpt4.errors import DataError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.text import counted
from minigpt4.training.bad_samples import BadSampleWatch
from minigpt4.training.checkpoint import (
    State,
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
from minigpt4.training.finite import check_moments, check_trained
from minigpt4.training.memory import memory_for
from minigpt4.training.objectives import Objective, TrainingStep
from minigpt4.training.processes import by_the_main_process, others_alive, spread
from minigpt4.training.readers import read_ahead, readers_alive
from minigpt4.training.recipe import Recipe, StageRecipe
from minigpt4.training.run_folder import (
    CHECKPOINT_FOLDER,
    append_line,
    flush_lines,
    forget_lines_after,
    going_on_later,
    metrics_path,
)
from minigpt4.training.schedule import batches_before, learning_rate, num_batches
from minigpt4.training.stopping import StopRequest, stop_requests
from minigpt4.training.update import PRECISIONS, Figures, Updater, chosen_precision, make_optimizer
from minigpt4.weights.files.disk import make_folder

Batches = Callable[[int, StageRecipe], Dataset[dict[str, Any]]]
"""From number and recipe of a stage to its data set: a process's batches, `accumulation` of them an update."""

BATCHES_AHEAD = 4
"""That each reader has ready."""
_LESS_MEMORY = "a smaller batch_size with as much more accumulation, gradient_checkpointing: true, or quantize: nf4"


@dataclass(frozen=True)
class Progress:
    """One update, as told to whoever watches, and a line of `metrics.jsonl`.

    Args:
        stage: The stage's name.
        step: Updates done in it.
        steps: Updates in it.
        loss: Of the update.
        accuracy: Share of targets that would have been said.
        learning_rate: Of the update.
        grad_norm: Of all gradients together, before clipping.
        tokens: Targets, over all processes.
        images: Pictures, over all processes.
        seconds: It took so long, loading included; validating and saving are no part of it.
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


class Observer(Protocol):
    """Who watches a run."""

    def goes_on(self, state: State) -> None:
        """Told once, in all processes, where a run that began before goes on; after its last stage nothing is left."""

    def update(self, progress: Progress) -> None:
        """Told of every update, in the main process."""

    def validation_loss(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        """Asked after every update, in all processes: the validation loss where it is time for it, else None."""

    def told_to_stop(self) -> None:
        """Told of the signal that asks to stop, in the process that got it."""


@dataclass
class _Run:
    recipe: Recipe
    model: MiniGPT4ForConditionalGeneration
    step: TrainingStep
    module: torch.nn.Module
    processes: PartialState
    observer: Observer
    stop: StopRequest
    state: State
    objectives: Mapping[str, Objective]
    written: tuple[int, int] | None = None


def train(
    recipe: Recipe,
    model: MiniGPT4ForConditionalGeneration,
    batches: Batches,
    observer: Observer,
    processes: PartialState,
    objectives: Mapping[str, Objective] | None = None,
) -> None:
    """Train a model in place, going on where an earlier run in `recipe.output` stopped.

    Args:
        recipe: What to do.
        model: The model, on its device; only its trainable parameters change.
        batches: Makes a stage's data set.
        observer: Who watches.
        processes: The processes of the run.
        objectives: By the names of stages that have another objective than `language`.

    Raises:
        ConfigError: There is not enough memory for an update.
        DataError: The loss stays no number, what learns became none, the data is too bad, or a reader ended.
        MiniGPT4Error: Another process of the run ended.
        StorageError: The run's folder cannot be written.
        WeightsError: All checkpoints are damaged, or of another model.
    """
    found = last_checkpoint(recipe.output)
    if found:
        load_trained(found[0], model)
        observer.goes_on(found[1])
    state = found[1] if found else State()
    step = TrainingStep(model)
    model.train()
    with (
        going_on_later(), stop_requests(observer.told_to_stop) as stop, others_alive(processes), readers_alive(),
    ):  # fmt: skip
        by_the_main_process(lambda: _go_back_to(recipe, state), processes)
        module = spread(step, recipe.parallel, processes)
        run = _Run(recipe, model, step, module, processes, observer, stop, state, objectives or {})
        for number in range(state.stage, len(recipe.stages)):
            _train_stage(run, number, batches, found[0] if found and state.step else None)
    model.eval()


def _go_back_to(recipe: Recipe, state: State) -> None:
    """Bring what lies beside the checkpoints to the state of the one that is gone on from."""
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
    updater = Updater(run.module, make_optimizer(run.module, stage), scaler, stage, precision, run.processes)
    if first and checkpoint is not None:
        load_optimizer(checkpoint, run.model, updater.optimizer)
        scaler.load_state_dict(run.state.scaler)
    watch = BadSampleWatch(run.recipe, run.processes, run.state)
    data = Subset(batches(number, stage), range(batches_before(stage, first), batches_before(stage, stage.steps)))
    started = time.monotonic()
    best = False
    with closing(read_ahead(data, run.recipe.workers, ahead=BATCHES_AHEAD)) as batches_read:
        for at, group in enumerate(_groups(batches_read, stage, first), first):
            _seed(run, at)
            rate = learning_rate(stage, at)
            with memory_for(f"an update of stage {stage.name}, {stage.batch_size:,} examples at once", _LESS_MEMORY):
                figures = updater(group, rate, stop=run.stop.asked)
            progress = _progress(stage, at, rate, figures, time.monotonic() - started)
            run.state.step = at + 1
            run.state.scaler = scaler.state_dict()
            by_the_main_process(lambda: _tell(run, progress), run.processes)  # noqa: B023  (called at once)
            watch.look_at(stage.name, at + 1, group)
            _count_skipped(run, stage, group, figures)
            best = _after_update(run, updater.optimizer, stage, figures)
            started = time.monotonic()  # a validation, or a checkpoint, took time that is no update's
    run.state.stage, run.state.step = number + 1, 0
    run.state.best_loss = None  # the next stage's is another loss, of other texts
    _save(run, None, best=best)


def _after_update(run: _Run, optimizer: torch.optim.Optimizer, stage: StageRecipe, figures: Figures) -> bool:
    """Validate, save and stop where it is time for it; returns whether the validation loss is the smallest so far."""
    done = run.state.step
    with memory_for(f"a validation of stage {stage.name}", _LESS_MEMORY):
        loss = run.observer.validation_loss(run.step, stage, done)
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
    """Write a checkpoint; gathering is the work of all processes, writing that of the main one."""
    tensors = trained_tensors(run.model)
    moments = optimizer_tensors(run.model, optimizer) if optimizer else {}
    check_trained(tensors, run.recipe, run.state)
    check_moments(moments, run.recipe, run.state)
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


def _tell(run: _Run, progress: Progress) -> None:
    append_line(metrics_path(run.recipe.output), asdict(progress))
    run.observer.update(progress)


def _count_skipped(run: _Run, stage: StageRecipe, group: list[dict[str, Any]], figures: Figures) -> None:
    """Stop a run whose loss stays no number, and leave the examples it was computed from in its folder."""
    if figures.rescaled:
        return
    if figures.skipped:
        check_trained(trained_tensors(run.model), run.recipe, run.state)  # else the examples would be blamed
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
    """Make this update's random numbers (dropout) its own, in every process."""
    recipe = run.recipe
    key = [recipe.seed, run.state.stage, at, run.processes.process_index]
    mixed = 0
    for number in key:
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
        import psutil  # type: ignore[import-untyped]  # comes with accelerate

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _groups(batches: Iterator[dict[str, Any]], stage: StageRecipe, first: int) -> Iterator[list[dict[str, Any]]]:
    """Collect the batches of each update."""
    for step in range(first, stage.steps):
        yield list(itertools.islice(batches, num_batches(stage, step)))
