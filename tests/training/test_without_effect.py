"""What a recipe says and nothing reads is refused; what `compat: original` says in a person's place is not."""

from pathlib import Path
from typing import Any

import pytest

from minigpt4.errors import ConfigError
from minigpt4.training.recipe import Recipe, make_recipe

PICTURES: dict[str, Any] = {"sources": [{"path": "pics"}]}
ORIGINAL = {"layout": "original", "bucket_batches": 1}


def made(data: dict[str, Any], stage: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    whole = {"name": "one", "steps": 5, "batch_size": 2, "learning_rate": 0.001, **(stage or {})}
    return make_recipe({"output": "out", "data": data, "stages": [whole], **changes}, Path("made up"))


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"end_symbol": "###"}, "layout: template"),
        ({"prompt_template": "###Human: {} ###Assistant: "}, "layout: template"),
        ({"keep_end": False}, "layout: template"),
        ({"turns": 4, **ORIGINAL}, "layout: original"),
        ({"decay_rate": 0.5}, "schedule: cosine"),
        ({"steps_per_epoch": 5}, "schedule: cosine"),
        (
            {"decay_rate": 0.5, "schedule": "linear_warmup_cosine_lr", "steps_per_epoch": 5},
            "schedule: linear_warmup_cosine_lr",
        ),
    ],
    ids=str,
)
def test_what_a_layout_or_a_schedule_does_not_read_is_refused(stage: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as told:
        made(PICTURES, stage)

    key = next(iter(stage))
    assert told.value.message == f"made up: stages.0.{key} changes nothing: it is not read with {reason}"


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"lora": {"rank": 4}}, "lora.rank"),
        ({"lora": {"rank": 16}, "trainable": ["qformer"]}, "lora.rank"),
        ({"model": {"vision_model": "v", "language_model": "l"}, "joining_parts": "trained"}, "joining_parts"),
        ({"validation": {**PICTURES, "pictures": 0, "question": "What?"}}, "validation.question"),
        ({"data": {"sources": [{"path": "p", "max_words": 5}]}}, "data.sources.0.max_words"),
        ({"data": {"sources": [{"path": "p", "caption_prompt": "a"}]}}, "data.sources.0.caption_prompt"),
    ],
    ids=str,
)
def test_what_a_run_does_not_read_is_refused(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=rf"^made up: {place} changes nothing: "):
        made(**{"data": PICTURES, **changes})


def test_a_source_of_one_stage_is_looked_at_too() -> None:
    with pytest.raises(ConfigError, match=r"^made up: stages\.0\.data\.sources\.0\.max_words changes nothing"):
        made(PICTURES, {"data": {"sources": [{"path": "p", "max_words": 5}]}})


def test_what_stands_on_the_command_line_is_told_as_such() -> None:
    content = {"output": "out", "data": PICTURES, "lora": {"rank": 4}}
    stage = {"name": "one", "steps": 5, "batch_size": 2, "learning_rate": 0.001}
    with pytest.raises(ConfigError, match=r"^--set: lora\.rank changes nothing"):
        make_recipe({**content, "stages": [stage]}, Path("made up"), ["lora.rank"])


@pytest.mark.parametrize(
    ("data", "stage", "changes"),
    [
        (PICTURES, {"layout": "template", "mix": "samples", "keep_end": True, "decay_rate": None}, {}),
        (PICTURES, {"steps_per_epoch": 5, "layout": "template"}, {"compat": "original"}),
        (PICTURES, {"end_symbol": "\n", "prompt_template": "{}", "keep_end": False, **ORIGINAL}, {}),
        (PICTURES, {"max_text_tokens": 20, "turns": 2, "prompt_for": "batch"}, {}),
        (PICTURES, {}, {"lora": {"rank": 4}, "trainable": ["lora"]}),
        ({"sources": [{"path": "p", "captions": "blip", "max_words": 5, "caption_prompt": "a"}]}, {}, {}),
    ],
    ids=str,
)
def test_what_is_read_or_says_what_happens_anyway_or_comes_from_compat_is_taken(
    data: dict[str, Any], stage: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert made(data, stage, **changes).stages


def test_a_recipe_with_compat_is_read_again_as_it_was_printed() -> None:
    recipe = made(PICTURES, {"steps_per_epoch": 5}, compat="original")
    printed = recipe.model_dump(mode="json", exclude_unset=True)

    assert make_recipe(printed, Path("printed")) == recipe
