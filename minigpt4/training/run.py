"""A whole training run, from recipe to alignment folder."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from minigpt4.data.batches import SourceBatches
from minigpt4.errors import ConfigError, MiniGPT4Error
from minigpt4.text import counted
from minigpt4.training.checkpoint import State, best_checkpoint, last_checkpoint, read_trained, whole
from minigpt4.training.features import cached_pictures
from minigpt4.training.loop import Batches, Callbacks, Progress, train
from minigpt4.training.model_setup import Prepared, check_libraries, prepare_model
from minigpt4.training.objectives import Objective, TrainingStep, check_packing
from minigpt4.training.processes import by_the_main_process, gather_parameters, joined
from minigpt4.training.recipe import Recipe, StageRecipe
from minigpt4.training.reports import Trackers, check_trackers, describe_texts, plot_metrics
from minigpt4.training.run_folder import (
    BAD_SAMPLES_FILE,
    check_recipe,
    check_sources,
    only_run,
    place_of,
    resumable,
)
from minigpt4.training.schedule import cut_rise
from minigpt4.training.stage_data import RunSources, check_data, is_packed, records_of, stage_data
from minigpt4.training.validation import Validation
from minigpt4.weights.alignment import ALIGNMENT_FILE, Origin, alignment_tensors, read_description, save_alignment
from minigpt4.weights.folder import Report

ALIGNMENT_FOLDER = "alignment"
BEST_ALIGNMENT_FOLDER = "alignment-best"
"""Of the checkpoint with the smallest validation loss, of runs that are validated."""


def _nobody(*_: object) -> None:
    """Hear what nobody wants to know."""


@dataclass(frozen=True)
class Reports:
    """Who is told of what happens, in the main process.

    Args:
        update: Of every update.
        parts: Of frozen parts being fetched and converted.
        features: Of pictures being looked at, with `features: cache`.
        sources: Of what takes long before: shards without an index being read, and the like.
        say: Of anything else, a sentence at a time.
    """

    update: Callable[[Progress], None] = _nobody
    parts: Report = _nobody
    features: Report = _nobody
    sources: Report = _nobody
    say: Callable[[str], None] = _nobody


@dataclass
class _Watcher(Callbacks):
    """Passes updates on, and validates."""

    recipe: Recipe
    reports: Reports
    validation: Validation | None
    trackers: Trackers | None

    def on_resume(self, state: State) -> None:
        if state.stage < len(self.recipe.stages):
            stage = self.recipe.stages[state.stage]
            made = f"after {state.step:,} of {counted(stage.steps, 'update')} of stage {stage.name}"
            if state.step > stage.steps:
                made = f"behind stage {stage.name}: {state.step:,} updates of it were made, "
                made += f"the recipe says {stage.steps:,}"
            self.reports.say(f"goes on {made}")
        else:
            self.reports.say(
                f"all updates of {self.recipe.output} were made before; to learn more, set another output, and "
                f"{self.recipe.output / ALIGNMENT_FOLDER} as the model"
            )

    def on_update(self, progress: Progress) -> None:
        self.reports.update(progress)
        figures = {key: value for key, value in asdict(progress).items() if isinstance(value, int | float)}
        self._track(progress.stage, progress.step, figures)

    def on_stop_request(self) -> None:
        self.reports.say("finishing this update, then saving; a second signal stops at once")

    def on_validation(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        loss = self.validation.loss(module, stage, step) if self.validation else None
        if loss is not None:
            self._track(stage.name, step, {"validation_loss": loss})
        return loss

    def _track(self, stage: str, step: int, figures: dict[str, Any]) -> None:
        if self.trackers:
            self.trackers.log(figures, updates_before(self.recipe, stage) + step)


def run(
    recipe: Recipe,
    reports: Reports | None = None,
    *,
    force: bool = False,
    batches: Callable[[Prepared], Batches] | None = None,
    objectives: Mapping[str, Objective] | None = None,
) -> Path:
    """Train an alignment, or go on with one.

    Args:
        recipe: What to do.
        reports: Who is told.
        force: Go on although the run began with another recipe.
        batches: Makes the batches that the recipe's `data` does not name, from the model and its processor. Item `i` of
            a stage's data set has to be a function of seed, stage and `i` alone, or a resumed run is another one.
        objectives: By the names of stages that have another objective than `language`.

    Returns:
        The alignment folder, which `minigpt4 ask -m` takes.

    Raises:
        ConfigError: The recipe does not fit the machine, the model, or the run that it goes on with.
        DataError: The data cannot be used, or the loss stays no number.
        DownloadError: A frozen part is not here and cannot be fetched.
        KeyboardInterrupt: The run was told to stop by SIGINT, and saved; likewise SystemExit by SIGTERM.
        StorageError: The run's folder cannot be written.
        WeightsError: The model, or a checkpoint, cannot be used.
    """
    check_trackers(recipe.report_to)
    check_libraries(recipe)
    with joined() as here:
        told = reports if reports and here.is_main_process else Reports()
        with only_run(recipe.output) if here.is_main_process else nullcontext():
            _run(recipe, here, told, batches, objectives, force=force)
    return recipe.output / ALIGNMENT_FOLDER


def _run(
    recipe: Recipe,
    here: PartialState,
    told: Reports,
    batches: Callable[[Prepared], Batches] | None,
    objectives: Mapping[str, Objective] | None,
    *,
    force: bool,
) -> None:
    by_the_main_process(lambda: check_recipe(recipe, here.num_processes, force=force), here)
    sources = RunSources(told.sources)
    check_data(recipe, sources)
    for sentence in sources.passed_over():
        told.say(sentence)
    by_the_main_process(lambda: _check_sources(recipe, sources, told.say, force=force), here)
    with _tracking(recipe, here) as trackers:
        prepared = _prepare_and_train(recipe, here, told, sources, trackers, batches, objectives)
    with resumable():
        _save(recipe, prepared, here, told.say)
        if here.is_main_process:
            _say_what_was_bad(recipe.output, told.say)
            _draw(recipe.output, told.say)


def _check_sources(recipe: Recipe, opened: RunSources, say: Callable[[str], None], *, force: bool) -> None:
    now, num_stages = records_of(recipe, opened), len(recipe.stages)
    check_sources(recipe.output, now, num_stages=num_stages, force=force, say=say)


def _prepare_and_train(
    recipe: Recipe,
    here: PartialState,
    told: Reports,
    sources: RunSources,
    trackers: Trackers | None,
    make_batches: Callable[[Prepared], Batches] | None,
    objectives: Mapping[str, Objective] | None,
) -> Prepared:
    """Load the model, and make the updates that are left."""
    torch.manual_seed(recipe.seed)
    prepared = prepare_model(recipe, here, told.parts)
    if is_packed(recipe):
        check_packing(prepared.model)
    kept = cached_pictures(recipe, prepared, here, told.features, sources) if recipe.features == "cache" else None
    batches = make_batches(prepared) if make_batches else stage_data(recipe, prepared, here, kept, sources)
    validation = None
    if recipe.validation:
        validation = Validation(recipe, recipe.validation, prepared, here, sources, kept)
    if here.is_main_process:
        _say_what_is_learnt(recipe, prepared, batches, told.say)
    try:
        train(recipe, prepared.model, batches, _Watcher(recipe, told, validation, trackers), here, objectives)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_stopped(recipe) if here.is_main_process else "") from stop
    except SystemExit:
        told.say(_stopped(recipe))
        raise
    return prepared


def _stopped(recipe: Recipe) -> str:
    return f"stopped and saved in {recipe.output}; the same command goes on"


def _save(recipe: Recipe, prepared: Prepared, here: PartialState, say: Callable[[str], None]) -> None:
    """Write the alignment, and that of the best checkpoint; gathering is the work of all processes, writing of one."""
    held = {name: whole(t) for name, t in alignment_tensors(prepared.model, prepared.origin).items()}
    gather_parameters(prepared.model.get_input_embeddings())  # the language model is known by them

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        target = recipe.output / name
        origin = _named_from(target, recipe, prepared.origin)
        save_alignment(target, prepared.model, prepared.processor, origin=origin, tensors=tensors, overwrite=True)

    def write_both() -> None:
        write(ALIGNMENT_FOLDER, held)
        best = best_checkpoint(recipe.output)
        if best is None:
            return
        try:
            trained = {name.removeprefix("model."): tensor for name, tensor in read_trained(best).items()}
        except MiniGPT4Error as error:
            say(f"the checkpoint with the smallest validation loss cannot be used: {error.message}")
            return
        write(BEST_ALIGNMENT_FOLDER, held | {name: trained[name] for name in held.keys() & trained.keys()})
        where = _last_update(recipe, best)
        say(f"{recipe.output / BEST_ALIGNMENT_FOLDER} is as after {where}, where the validation loss was smallest")

    by_the_main_process(write_both, here)


def _last_update(recipe: Recipe, checkpoint: Path) -> str:
    """Name the last update that a checkpoint holds."""
    number, step = place_of(checkpoint)
    stage = recipe.stages[number if step else number - 1]
    return f"update {step or stage.steps:,} of stage {stage.name}"


def _named_from(target: Path, recipe: Recipe, origin: Origin) -> Origin:
    """Name the frozen parts from the alignment's folder if the alignment that was gone on from names them from its own.

    Such parts lie in a run's folder, which may be moved together with this one.
    """
    before = Path(recipe.model) if isinstance(recipe.model, str) else None
    if before is None or not (before / ALIGNMENT_FILE).is_file():
        return origin
    named = str(read_description(before)["frozen_parts"])
    if Path(named).is_absolute() or not (before / named).is_dir():  # nano, an id of a hub, a folder of its own place
        return origin
    return replace(origin, frozen_parts=os.path.relpath(origin.frozen_parts, target.resolve()))


def _say_what_was_bad(output: Path, say: Callable[[str], None]) -> None:
    path = output / BAD_SAMPLES_FILE
    count = len(path.read_bytes().splitlines()) if path.exists() else 0
    if count:
        say(f"another example stood in for a bad one {counted(count, 'time')}: {path} lists them")


def _draw(output: Path, say: Callable[[str], None]) -> None:
    """Draw the run's curves; a run that ended well does not fail because nothing is here to draw with."""
    try:
        say(f"curves: {plot_metrics(output)}")
    except ConfigError as error:
        say(f"no curves were drawn: {error.message}" + (f" ({error.hint})" if error.hint else ""))


@contextmanager
def _tracking(recipe: Recipe, here: PartialState) -> Iterator[Trackers | None]:
    """Open the trackers, in the main process and before the model loads: one may not be logged in."""
    trackers: Trackers | None = None

    def begin() -> None:
        nonlocal trackers
        found = last_checkpoint(recipe.output)
        state = found[1] if found else State()
        first = sum(stage.steps for stage in recipe.stages[: state.stage]) + state.step
        trackers = Trackers(recipe.report_to, recipe.output, recipe.model_dump(mode="json"), first_step=first)

    by_the_main_process(begin, here)
    try:
        yield trackers
    finally:
        if trackers:
            trackers.finish()


def updates_before(recipe: Recipe, stage: str) -> int:
    """Return how many updates the stages before one have."""
    return sum(s.steps for s in recipe.stages[: [s.name for s in recipe.stages].index(stage)])


def _say_what_is_learnt(recipe: Recipe, prepared: Prepared, batches: Batches, say: Callable[[str], None]) -> None:
    """Say what learns, and how long the texts of each stage are."""
    parameters = [p for p in prepared.model.parameters() if p.requires_grad]
    parts = recipe.trainable or prepared.model.config.trainable_parts
    say(f"{sum(p.numel() for p in parameters):,} numbers learn, in {', '.join(parts)}")
    for number, stage in enumerate(recipe.stages):
        data = batches(number, stage)
        if isinstance(data, SourceBatches):
            say(describe_texts(data, stage.name))
        if warning := cut_rise(stage):
            say(warning)
