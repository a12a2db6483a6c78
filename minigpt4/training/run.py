"""A whole training run, from recipe to alignment folder."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt4.training.checkpoint import whole
from minigpt4.training.features import cached_pictures
from minigpt4.training.loop import Progress, train
from minigpt4.training.objectives import TrainingStep
from minigpt4.training.preparing import prepare_model
from minigpt4.training.processes import by_the_main_process, processes
from minigpt4.training.recipe import Recipe, StageRecipe
from minigpt4.training.run_folder import check_recipe, only_run
from minigpt4.training.stage_data import stage_data
from minigpt4.training.validation import Validation
from minigpt4.weights.alignment import alignment_tensors, save_alignment
from minigpt4.weights.folder import Report

ALIGNMENT_FOLDER = "alignment"


@dataclass
class _Watcher:
    """Passes updates on, and validates."""

    report: Callable[[Progress], None]
    validation: Validation | None
    main: bool

    def update(self, progress: Progress) -> None:
        if self.main:
            self.report(progress)

    def validation_loss(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        return self.validation.loss(module, stage, step) if self.validation else None


def run(
    recipe: Recipe,
    report: Callable[[Progress], None],
    report_parts: Report | None = None,
    report_features: Report | None = None,
    *,
    force: bool = False,
) -> Path:
    """Train an alignment, or go on with one.

    Args:
        recipe: What to do.
        report: Told of every update, in the main process.
        report_parts: Told of frozen parts being fetched and converted.
        report_features: Told of pictures being looked at, with `features: cache`.
        force: Go on although the run began with another recipe.

    Returns:
        The alignment folder, which `minigpt4 ask -m` takes.

    Raises:
        ConfigError: The recipe does not fit the machine, the model, or the run that it goes on with.
        DataError: The data cannot be used, or the loss stays no number.
        DownloadError: A frozen part is not here and cannot be fetched.
        StorageError: The run's folder cannot be written.
        WeightsError: The model, or a checkpoint, cannot be used.
    """
    here = processes()
    with only_run(recipe.output) if here.is_main_process else nullcontext():
        by_the_main_process(lambda: check_recipe(recipe, here.num_processes, force=force), here)
        torch.manual_seed(recipe.seed)
        prepared = prepare_model(recipe, here, report_parts)
        validation = Validation.of(recipe, prepared, here) if recipe.validation else None
        watcher = _Watcher(report, validation, here.is_main_process)
        kept = cached_pictures(recipe, prepared, here, report_features) if recipe.features == "cache" else None
        train(recipe, prepared.model, stage_data(recipe, prepared, here, kept), watcher, here)
        target = recipe.output / ALIGNMENT_FOLDER

        held = {name: whole(t) for name, t in alignment_tensors(prepared.model, prepared.origin).items()}

        def save() -> None:
            save_alignment(
                target, prepared.model, prepared.processor, origin=prepared.origin, tensors=held, overwrite=True
            )

        by_the_main_process(save, here)
    return target
