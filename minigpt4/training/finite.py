"""Numbers that cannot be computed with end a run before they are written: no checkpoint and no alignment holds one."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minigpt4.errors import DataError
from minigpt4.training.checkpoint import State
from minigpt4.training.recipe import Recipe
from minigpt4.training.run_folder import newest_first, place_of

LARGEST = math.sqrt(torch.finfo(torch.float32).max)
"""Squares of larger weights are infinite, and with them every norm and attention behind them."""


def check_trained(tensors: Mapping[str, Tensor], recipe: Recipe, state: State) -> None:
    """Refuse trained tensors that are not finite, or as good as infinite.

    Args:
        tensors: What was trained, by name.
        recipe: The run's.
        state: After the last update.

    Raises:
        DataError: One is not; names it, the update, and the checkpoint that is left.
    """
    _check(tensors, LARGEST, recipe, state)


def check_moments(tensors: Mapping[str, Tensor], recipe: Recipe, state: State) -> None:
    """Refuse moments of the optimizer that are not finite, as `check_trained` does."""
    _check(tensors, torch.finfo(torch.float32).max, recipe, state)


def _check(tensors: Mapping[str, Tensor], largest: float, recipe: Recipe, state: State) -> None:
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        worst = max((abs(float(end)) for end in tensor.aminmax()), key=lambda size: (math.isnan(size), size))
        if not worst <= largest:
            stage, step = _last_update(recipe, state)
            raise DataError(
                f"{name.removeprefix('model.')} came to {worst:.3g} after step {step} of stage {stage}, "
                f"at most {largest:.3g} can be computed with",
                hint=f"lower the learning rate; {_going_on(recipe, state)}",
            )


def _going_on(recipe: Recipe, state: State) -> str:
    so_far = (folder for folder in newest_first(recipe.output) if place_of(folder) <= [state.stage, state.step])
    last = next(so_far, None)
    if last is None:
        return "nothing was saved, so --force or another output begins anew"
    return f"then --force goes on from the last checkpoint, {last}, or another output begins anew"


def _last_update(recipe: Recipe, state: State) -> tuple[str, int]:
    """Return the stage's name and the step of the last update; a state after a stage is at the next one's beginning."""
    if state.step:
        return recipe.stages[state.stage].name, state.step
    before = recipe.stages[state.stage - 1]
    return before.name, before.steps
