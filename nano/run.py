"""A run that trains nano: its recipe, its batches and its objective, handed to `minigpt4.training.run.run`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.utils.data import Dataset

from minigpt4.training.loop import Batches
from minigpt4.training.model_setup import Prepared
from minigpt4.training.recipe import Recipe, StageRecipe
from minigpt4.training.run import Reports, run
from minigpt4.training.schedule import batches_before
from minigpt4.weights.nano import class_words
from nano.batches import NanoBatches
from nano.mixture import NanoMixture
from nano.objective import words
from nano.shards import shards_in


class Mixture(BaseModel):
    """Where a stage's examples come from, in which proportion, and what they teach; see `nano.mixture`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    photos: Path
    backgrounds: Path | None = None
    sprites: Path | None = None
    objective: Literal["words", "language"] = "language"
    share_photos: float = Field(0.4, ge=0, le=1)
    share_imagined: float = Field(0.2, ge=0, le=1)
    share_unsure: float = Field(0.04, ge=0, le=1)
    share_second: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _add_up(self) -> "Mixture":
        if (total := self.share_photos + self.share_imagined + self.share_unsure) > 1 + 1e-9:
            raise ValueError(
                f"share_photos, share_imagined and share_unsure are {total:g} together, expected 1 at most"
            )
        return self


class NanoRecipe(Recipe):
    """A recipe whose examples are nano's own; a stage's `data` is what differs from `mixture` in it."""

    mixture: Mixture

    @model_validator(mode="after")
    def _can_be_mixed(self) -> "NanoRecipe":
        for stage in self.stages:
            self.mixture_of(stage)
        return self

    def mixture_of(self, stage: StageRecipe) -> Mixture:
        """Return where a stage's examples come from."""
        return Mixture.model_validate({**self.mixture.model_dump(), **stage.data})


def make_batches(recipe: NanoRecipe, prepared: Prepared) -> Batches:
    """Return what makes the batches of a stage."""
    config = prepared.model.config

    def of_stage(number: int, stage: StageRecipe) -> Dataset[dict[str, Any]]:
        mixture = recipe.mixture_of(stage).model_dump()
        return NanoBatches(
            objective=mixture.pop("objective"),
            mixture=NanoMixture(words=class_words(), seed=recipe.seed, **mixture),
            vision_model=prepared.model.model.vision_model,
            tokenizer=prepared.processor.tokenizer,
            image_token_id=config.image_token_id,
            stage=number,
            steps=batches_before(stage, stage.steps),
            batch_size=stage.batch_size,
            turns=stage.turns,
            num_image_tokens=config.num_image_tokens,
            num_word_places=config.num_image_tokens - config.vision_config.num_concept_tokens,
        )

    return of_stage


def train(recipe: NanoRecipe, reports: Reports | None = None, *, force: bool = False) -> Path:
    """Train nano, or go on; returns its alignment folder.

    Raises:
        MiniGPT4Error: As `minigpt4.training.run.run`; DataError where a folder has no shards.
    """
    mixtures = {stage.name: recipe.mixture_of(stage) for stage in recipe.stages}
    for mixture in mixtures.values():
        for folder in filter(None, (mixture.photos, mixture.backgrounds)):
            shards_in(folder)
    objectives = {name: words for name, mixture in mixtures.items() if mixture.objective == "words"}
    return run(
        recipe, reports, force=force, batches=lambda prepared: make_batches(recipe, prepared), objectives=objectives
    )
