"""Options of a recipe that change nothing beside its others: whoever sets one expects something that does not happen.

Only what a person wrote counts, not what `compat: original` puts in its place; and no value that says what happens
anyway.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from minigpt4.training.recipe import Recipe, SourceRecipe, StageRecipe

Found = tuple[str, str]
"""The place of an option, and why it changes nothing."""

_OF_THE_LAYOUT: dict[str, dict[str, Any]] = {
    "template": {"prompt_template": None, "end_symbol": None, "keep_end": True},
    "original": {"turns": 1},
}
"""What is not read of a stage in a layout."""

_OF_THE_SCHEDULE: dict[str, dict[str, Any]] = {
    "cosine": {"steps_per_epoch": None, "decay_rate": None},
    "linear_warmup_cosine_lr": {"decay_rate": None},
    "linear_warmup_step_lr": {},
}
"""What is not read of a stage with a schedule."""


def without_effect(recipe: "Recipe", compat: Mapping[str, Any]) -> Iterator[Found]:
    """Find what a person has set and nothing reads.

    Args:
        recipe: The recipe, valid.
        compat: What was put in the place of what is not said, in every stage.
    """
    yield from _of_the_run(recipe)
    for number, stage in enumerate(recipe.stages):
        for key, reason in _of_a_stage(stage):
            if key not in compat or getattr(stage, key) != compat[key]:
                yield f"stages.{number}.{key}", reason
        if "sources" in stage.data:
            yield from _of_sources(f"stages.{number}.data", getattr(recipe.data_of(stage), "sources", []))
    yield from _of_sources("data", getattr(recipe.data, "sources", []))


def _of_the_run(recipe: "Recipe") -> Iterator[Found]:
    if recipe.lora.model_fields_set and "lora" not in (recipe.trainable or []):
        key = min(recipe.lora.model_fields_set)
        yield f"lora.{key}", "there are no adapters where trainable does not name lora"
    if not isinstance(recipe.model, str) and _set(recipe, "joining_parts", "new"):
        yield "joining_parts", "a model that is put together has new ones"
    if recipe.validation and not recipe.validation.pictures and _set(recipe.validation, "question", None):
        yield "validation.question", "with pictures: 0 nobody is asked"


def _of_a_stage(stage: "StageRecipe") -> Iterator[Found]:
    unread = {key: (value, f"schedule: {stage.schedule}") for key, value in _OF_THE_SCHEDULE[stage.schedule].items()}
    unread |= {key: (value, f"layout: {stage.layout}") for key, value in _OF_THE_LAYOUT[stage.layout].items()}
    for key, (happens, reason) in unread.items():
        if _set(stage, key, happens):
            yield key, f"it is not read with {reason}"


def _of_sources(place: str, sources: Sequence["SourceRecipe"]) -> Iterator[Found]:
    for number, source in enumerate(sources):
        for key in ("max_words", "caption_prompt"):
            if source.captions != "blip" and _set(source, key, None):
                yield f"{place}.sources.{number}.{key}", "only captions: blip reads it"


def _set(section: BaseModel, key: str, happens: object) -> bool:
    """Tell whether a person gave an option a value, and none that says what happens anyway."""
    value = getattr(section, key)
    return key in section.model_fields_set and value is not None and value != happens
