"""A training recipe: one validated YAML file; an unknown key is an error that names the nearest known one."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from minigpt4.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecipe(_Section):
    """Where the examples come from, and in which proportion; see `minigpt4.data.nano_mixture`."""

    photos: Path
    backgrounds: Path | None = None
    sprites: Path | None = None
    share_photos: float = Field(0.4, ge=0, le=1)
    share_imagined: float = Field(0.2, ge=0, le=1)
    share_unsure: float = Field(0.04, ge=0, le=1)


class StageRecipe(_Section):
    """One stage of training.

    `turns` is the largest number of questions about a picture; `objective` is one of `training.objectives`; `threads`
    are the trainer's own, beside the loader's workers.
    """

    name: str
    objective: Literal["words", "language"]
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(50, ge=0)
    final_learning_rate: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    turns: int = Field(1, ge=1, le=4)
    threads: int = Field(2, gt=0)
    data: dict[str, float] = Field(default_factory=dict, description="Shares that differ from the recipe's.")


class Recipe(_Section):
    """All of a training run."""

    model: Literal["nano"]
    output: Path
    seed: int = 1
    data: DataRecipe
    stages: list[StageRecipe] = Field(min_length=1)
    checkpoint_steps: int = Field(50, gt=0)
    workers: int = Field(1, ge=0)

    @field_validator("stages")
    @classmethod
    def _have_names_of_their_own(cls, stages: list[StageRecipe]) -> list[StageRecipe]:
        names = [stage.name for stage in stages]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two stages have the name {twice[0]!r}")
        return stages


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: The YAML file; relative paths in it are taken from the working directory.
        overrides: `key=value`, dotted (`data.photos=DIR`, `stages.0.steps=10`); the value is YAML.

    Raises:
        ConfigError: Not a file, not YAML, an unknown key or a wrong value, each with its place.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the recipe {path}: {error.strerror}", hint="recipes/ in the source tree holds some to copy"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not YAML: {' '.join(str(error).split())}", hint="mend that line, or copy a file from recipes/"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no keys", hint="copy one of the files in recipes/")
    for override in overrides or []:
        _set(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(path, error) from error


def _set(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override} has no value", hint="write --set key=value, for example --set seed=2")
    *parents, last = key.split(".")
    place: Any = content
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML", hint="put it in quotes") from error
    try:
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
        place[int(last) if isinstance(place, list) else last] = read
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--set {key}: the recipe has no such place", hint="stages are counted from 0: --set stages.0.steps=100"
        ) from error


def _explain(path: Path, error: ValidationError) -> ConfigError:
    # A misspelt key is often also a missing one; the misspelling is the cause.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        reason = first["msg"].removeprefix("Value error, ")
        return ConfigError(f"{path}: {place}: {reason}", hint=f"the value there is {first['input']!r}"[:200])
    known = sorted({*Recipe.model_fields, *DataRecipe.model_fields, *StageRecipe.model_fields})
    near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
    return ConfigError(f"{path}: unknown key {place}", hint=hint)
