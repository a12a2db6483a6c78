"""The learning rate of an update, a function of its number.

`cosine` is ours. `linear_warmup_cosine_lr` and `linear_warmup_step_lr` are the original's, digit for digit, oddities
included: they count batches and epochs, so `warmup_steps` and `steps_per_epoch` are batches there, and an update has
the learning rate of the last batch that goes into it. Without accumulation a batch is an update.

Knows numbers only.
"""

import math

from minigpt4.errors import ConfigError
from minigpt4.training.recipe import StageRecipe


def learning_rate(stage: StageRecipe, step: int) -> float:
    """Return the learning rate of an update.

    Args:
        stage: Its schedule.
        step: Updates before this one in the stage; from 0, and beyond `stage.steps` too.

    Raises:
        ConfigError: An epoch of the original's schedules is shorter than one update.
    """
    if stage.schedule == "cosine":
        return _cosine(stage, step)
    epoch, batch = place_in_epoch(stage, step)
    if stage.schedule == "linear_warmup_cosine_lr":
        return _linear_warmup_cosine(stage, epoch, batch)
    return _linear_warmup_step(stage, epoch, batch)


def cut_rise(stage: StageRecipe) -> str:
    """Return a warning if a stage ends before its learning rate has risen; else nothing."""
    is_ours = stage.schedule == "cosine"
    steps = stage.steps if is_ours else batches_before(stage, stage.steps)
    if stage.warmup_steps <= steps:
        return ""
    highest = max(learning_rate(stage, step) for step in range(stage.steps))
    return (
        f"stage {stage.name}: WARNING: the learning rate rises over {stage.warmup_steps:,} "
        f"{'updates' if is_ours else 'batches'} (warmup_steps), and the stage has {steps:,}: {highest:.3g} is the "
        f"highest it comes to, not {stage.learning_rate:.3g}"
    )


def place_in_epoch(stage: StageRecipe, step: int) -> tuple[int, int]:
    """Return the epoch of an update, and the number in the epoch of the last batch that goes into it.

    The original updates after every `accumulation` batches of an epoch. Batches that are left over at its end make no
    update of their own: their gradients go into the first of the next epoch; see `num_batches`.
    """
    epoch, update = divmod(step, updates_per_epoch(stage))
    return epoch, (update + 1) * stage.accumulation - 1


def num_batches(stage: StageRecipe, step: int) -> int:
    """Return how many batches go into an update: `accumulation`, and what the original's last epoch left over."""
    if stage.schedule == "cosine" or step == 0 or step % updates_per_epoch(stage):
        return stage.accumulation
    return stage.accumulation + _batches_per_epoch(stage) % stage.accumulation


def batches_before(stage: StageRecipe, step: int) -> int:
    """Return how many batches went into the updates before one; before `stage.steps`, how many the stage takes."""
    if stage.schedule == "cosine" or step == 0:
        return step * stage.accumulation
    epochs_begun = (step - 1) // updates_per_epoch(stage)  # besides the first
    return step * stage.accumulation + epochs_begun * (_batches_per_epoch(stage) % stage.accumulation)


def updates_per_epoch(stage: StageRecipe) -> int:
    """Return how many updates an epoch of the original's schedules has.

    Raises:
        ConfigError: It is shorter than one update.
    """
    if _batches_per_epoch(stage) < stage.accumulation:
        raise ConfigError(
            f"the epochs of stage {stage.name} have {_batches_per_epoch(stage)} batches, an update takes "
            f"{stage.accumulation}",
            "make steps_per_epoch larger, or accumulation smaller",
        )
    return _batches_per_epoch(stage) // stage.accumulation


def _cosine(stage: StageRecipe, step: int) -> float:
    """Rise linearly over `warmup_steps`, then fall along a cosine to `final_learning_rate`."""
    if step < stage.warmup_steps:
        lowest = _lowest(stage)
        return lowest + (stage.learning_rate - lowest) * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / max(stage.steps - stage.warmup_steps, 1)
    return _along_cosine(stage, done)


def _linear_warmup_cosine(stage: StageRecipe, epoch: int, batch: int) -> float:
    """Rise within the epoch until `warmup_steps` batches are done, then follow a cosine that began with the stage.

    The rise starts again with each epoch that it reaches into, and the cosine continues from where it would be by
    then, so the learning rate jumps there.
    """
    done = epoch * _batches_per_epoch(stage) + batch
    if done < stage.warmup_steps:
        return _ramp(stage, batch)
    epochs = stage.steps / updates_per_epoch(stage)
    return _along_cosine(stage, done, epochs * _batches_per_epoch(stage))


def _linear_warmup_step(stage: StageRecipe, epoch: int, batch: int) -> float:
    """Rise in the first epoch and stay, then fall by `decay_rate` with each epoch, not below `final_learning_rate`."""
    if epoch == 0:
        return _ramp(stage, batch)
    decay_rate = 1.0 if stage.decay_rate is None else stage.decay_rate
    return max(stage.final_learning_rate, stage.learning_rate * float(decay_rate**epoch))


def _ramp(stage: StageRecipe, batch: int) -> float:
    lowest = _lowest(stage)
    rise = (stage.learning_rate - lowest) * batch / max(stage.warmup_steps, 1)
    return min(stage.learning_rate, lowest + rise)


def _along_cosine(stage: StageRecipe, done: float, whole: float = 1.0) -> float:
    # In the original's order of operations: near the end of a fall to 0 another rounds to other digits.
    height = stage.learning_rate - stage.final_learning_rate
    return stage.final_learning_rate + height * 0.5 * (1 + math.cos(math.pi * done / whole))


def _lowest(stage: StageRecipe) -> float:
    """Return where the rise begins."""
    return stage.warmup_learning_rate if stage.warmup_learning_rate >= 0 else stage.learning_rate


def _batches_per_epoch(stage: StageRecipe) -> int:
    return stage.steps_per_epoch or 1  # the recipe has it wherever a schedule counts epochs
