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
from minigpt4.weights.hub import Report

ALIGNMENT_FOLDER = "alignment"
BEST_ALIGNMENT_FOLDER = "alignment-best"
"""Of the checkpoint with the smallest validation loss, of runs that are validated."""


def _ignore(*_: object) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Reports:
    """Functions that are called as a run goes on, in the main process.

    Args:
        update: With every update.
        parts: With frozen parts that are fetched and converted.
        features: With pictures whose features are computed, with `features: cache`.
        sources: With what takes long before: shards without an index being read, and the like.
        say: With anything else, a sentence at a time.
    """

    update: Callable[[Progress], None] = _ignore
    parts: Report = _ignore
    features: Report = _ignore
    sources: Report = _ignore
    say: Callable[[str], None] = _ignore


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
        reports: What is called as it goes on.
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
        KeyboardInterrupt: The run was stopped by SIGINT, and saved; likewise SystemExit by SIGTERM.
        StorageError: The run's folder cannot be written.
        WeightsError: The model, or a checkpoint, cannot be used.
    """
    check_trackers(recipe.report_to)
    check_libraries(recipe)
    with joined() as here:
        reported = reports if reports and here.is_main_process else Reports()
        with only_run(recipe.output) if here.is_main_process else nullcontext():
            _Run(recipe, here, reported, RunSources(reported.sources), force).go(batches, objectives)
    return recipe.output / ALIGNMENT_FOLDER


@dataclass
class _Run(Callbacks):
    """A run in one of its processes."""

    recipe: Recipe
    here: PartialState
    reports: Reports
    sources: RunSources
    force: bool
    trackers: Trackers | None = None
    validation: Validation | None = None

    def go(self, batches: Callable[[Prepared], Batches] | None, objectives: Mapping[str, Objective] | None) -> None:
        """Check what can be checked before a model is loaded, train, and save."""
        recipe, say = self.recipe, self.reports.say
        by_the_main_process(lambda: check_recipe(recipe, self.here.num_processes, force=self.force), self.here)
        check_data(recipe, self.sources)
        for sentence in self.sources.passed_over():
            say(sentence)
        by_the_main_process(self._check_sources, self.here)
        with self._tracking():
            torch.manual_seed(recipe.seed)
            prepared = prepare_model(recipe, self.here, self.reports.parts)
            self._train(prepared, batches, objectives)
        with resumable():
            self._save(prepared)
            if self.here.is_main_process:
                _report_bad_samples(recipe.output, say)
                _draw(recipe.output, say)

    def _check_sources(self) -> None:
        records, num_stages = records_of(self.recipe, self.sources), len(self.recipe.stages)
        check_sources(self.recipe.output, records, num_stages=num_stages, force=self.force, say=self.reports.say)

    def _train(
        self,
        prepared: Prepared,
        make_batches: Callable[[Prepared], Batches] | None,
        objectives: Mapping[str, Objective] | None,
    ) -> None:
        """Make the updates that are left."""
        recipe, here, kept = self.recipe, self.here, None
        if is_packed(recipe):
            check_packing(prepared.model)
        if recipe.features == "cache":
            kept = cached_pictures(recipe, prepared, here, self.reports.features, self.sources)
        batches = make_batches(prepared) if make_batches else stage_data(recipe, prepared, here, kept, self.sources)
        if recipe.validation:
            self.validation = Validation(recipe, recipe.validation, prepared, here, self.sources, kept)
        if here.is_main_process:
            _report_what_learns(recipe, prepared, batches, self.reports.say)
        stopped = f"stopped and saved in {recipe.output}; the same command goes on"
        try:
            train(recipe, prepared.model, batches, self, here, objectives)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(stopped if here.is_main_process else "") from stop
        except SystemExit:
            self.reports.say(stopped)
            raise

    def on_resume(self, state: State) -> None:
        """Say where the run goes on."""
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
        """Report an update, also to the trackers."""
        self.reports.update(progress)
        figures = {key: value for key, value in asdict(progress).items() if isinstance(value, int | float)}
        self._track(progress.stage, progress.step, figures)

    def on_stop_request(self) -> None:
        """Say that the run is about to stop."""
        self.reports.say("finishing this update, then saving; a second signal stops at once")

    def on_validation(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        """Return the validation loss, where it is time for one."""
        loss = self.validation.loss(module, stage, step) if self.validation else None
        if loss is not None:
            self._track(stage.name, step, {"validation_loss": loss})
        return loss

    def _track(self, stage: str, step: int, figures: dict[str, Any]) -> None:
        if self.trackers:
            before = self.recipe.stages[: [s.name for s in self.recipe.stages].index(stage)]
            self.trackers.log(figures, sum(s.steps for s in before) + step)

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        """Open the trackers, in the main process and before the model loads: one may not be logged in."""
        recipe = self.recipe

        def begin() -> None:
            found = last_checkpoint(recipe.output)
            state = found[1] if found else State()
            first = sum(stage.steps for stage in recipe.stages[: state.stage]) + state.step
            self.trackers = Trackers(recipe.report_to, recipe.output, recipe.model_dump(mode="json"), first_step=first)

        by_the_main_process(begin, self.here)
        try:
            yield
        finally:
            if self.trackers:
                self.trackers.finish()

    def _save(self, prepared: Prepared) -> None:
        """Write the alignment, and that of the best checkpoint; all processes gather, one writes."""
        held = {name: whole(t) for name, t in alignment_tensors(prepared.model, prepared.origin).items()}
        gather_parameters(prepared.model.get_input_embeddings())  # the language model is known by them

        def write(name: str, tensors: dict[str, Tensor]) -> None:
            target = self.recipe.output / name
            origin = _named_from(target, self.recipe, prepared.origin)
            save_alignment(target, prepared.model, prepared.processor, origin=origin, tensors=tensors, overwrite=True)

        def write_both() -> None:
            write(ALIGNMENT_FOLDER, held)
            if (best := best_checkpoint(self.recipe.output)) is None:
                return
            try:
                trained = {name.removeprefix("model."): tensor for name, tensor in read_trained(best).items()}
            except MiniGPT4Error as error:
                self.reports.say(f"the checkpoint with the smallest validation loss cannot be used: {error.message}")
                return
            write(BEST_ALIGNMENT_FOLDER, held | {name: trained[name] for name in held.keys() & trained.keys()})
            number, step = place_of(best)
            stage = self.recipe.stages[number if step else number - 1]
            self.reports.say(
                f"{self.recipe.output / BEST_ALIGNMENT_FOLDER} is as after update {step or stage.steps:,} of stage "
                f"{stage.name}, where the validation loss was smallest"
            )

        by_the_main_process(write_both, self.here)


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


def _report_what_learns(recipe: Recipe, prepared: Prepared, batches: Batches, say: Callable[[str], None]) -> None:
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


def _report_bad_samples(output: Path, say: Callable[[str], None]) -> None:
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
