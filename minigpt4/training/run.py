"""A whole training run, from recipe to alignment folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from minigpt4.data.collate import Batches
from minigpt4.data.nano_mixture import NanoMixture
from minigpt4.training.loop import Progress, train
from minigpt4.training.recipe import Recipe, StageRecipe
from minigpt4.weights import nano
from minigpt4.weights.folder import save_alignment

ALIGNMENT_FOLDER = "alignment"


def run(
    recipe: Recipe,
    report: Callable[[Progress], None],
    report_parts: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Train an alignment over nano's frozen parts, or go on with one.

    Args:
        recipe: What to do.
        report: Told of every step.
        report_parts: Told of the frozen parts being fetched and converted.

    Returns:
        The alignment folder, which `minigpt4 ask -m` takes.

    Raises:
        DataError: The data cannot be used, or the loss is not a number.
        DownloadError: A frozen part is not here and cannot be fetched.
    """
    torch.manual_seed(recipe.seed)
    language_model_dir, vision_weights = nano.frozen_parts(report_parts)
    model, tokenizer = nano.assemble(language_model_dir, vision_weights)

    def batches(number: int, stage: StageRecipe) -> Dataset[dict[str, Any]]:
        data = {**recipe.data.model_dump(), **stage.data}
        return Batches(
            mixture=NanoMixture(words=nano.class_words(), seed=recipe.seed, **data),
            vision_model=model.model.vision_model,
            tokenizer=tokenizer,
            image_token_id=model.config.image_token_id,
            stage=number,
            steps=stage.steps,
            batch_size=stage.batch_size,
            turns=stage.turns,
            objective=stage.objective,
            num_image_tokens=model.config.num_image_tokens,
            num_word_places=model.config.num_image_tokens - model.config.vision_config.num_concept_tokens,
        )

    train(recipe, model, batches, report)
    target = recipe.output / ALIGNMENT_FOLDER
    save_alignment(target, model, nano.make_processor(model.config, tokenizer), overwrite=True)
    return target
