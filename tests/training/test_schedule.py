"""The learning rate: ours, and the original's two schedules digit for digit."""

import math
from itertools import pairwise
from typing import Any

import pytest

from minigpt4.errors import ConfigError
from minigpt4.training.recipe import StageRecipe
from minigpt4.training.schedule import batches_before, cut_rise, learning_rate, num_batches, place_in_epoch
from tests import golden

CASES = [
    "stage1", "stage2", "odd_warmup_longer_than_epoch", "odd_no_warmup", "odd_negative_warmup_lr",
    "odd_past_max_epoch", "odd_warmup_lr_above_init_lr", "step_decay0.7", "step_decay0.1_min_lr_floor",
    "step_decay1_no_warmup",
]  # fmt: skip


def stage(**changes: Any) -> StageRecipe:
    settings = {"name": "one", "steps": 100, "batch_size": 1, "learning_rate": 1e-3, "warmup_steps": 10, **changes}
    return StageRecipe.model_validate(settings)


def recorded(case: dict[str, Any]) -> StageRecipe:
    """The recipe of a recorded schedule."""
    settings = case["kwargs"]
    batches = settings.get("iters_per_epoch") or max(step for _, step, _ in case["points"]) + 1
    return stage(
        schedule=case["scheduler"],
        steps=settings["max_epoch"] * batches,
        steps_per_epoch=batches,
        learning_rate=settings["init_lr"],
        final_learning_rate=settings["min_lr"],
        warmup_learning_rate=settings["warmup_start_lr"],
        warmup_steps=settings["warmup_steps"],
        decay_rate=settings["decay_rate"],
    )


@pytest.mark.parametrize("name", CASES)
def test_learning_rates_are_the_originals(name: str) -> None:
    case = golden.content("golden/lr_schedule.json")[name]
    of_case = recorded(case)
    for epoch, step, rate in case["points"]:
        number = epoch * (of_case.steps_per_epoch or 0) + step
        assert learning_rate(of_case, number) == pytest.approx(rate, rel=1e-12, abs=0)


@pytest.mark.parametrize("lowest", [0.0, 1e-5])
@pytest.mark.parametrize("warmup", [0, 5, 19, 60])
@pytest.mark.parametrize("epochs", [1, 3])
def test_learning_rates_are_the_originals_formula_to_the_bit(epochs: int, warmup: int, lowest: float) -> None:
    """Where the last ones come near 0, rounding in another order would show in the eleventh digit."""
    batches, highest, first = 19, 0.0011436, 1e-6
    schedule = {"schedule": "linear_warmup_cosine_lr", "steps": epochs * batches, "steps_per_epoch": batches}
    rates = {"learning_rate": highest, "final_learning_rate": lowest, "warmup_learning_rate": first}
    of_ours = stage(**schedule, **rates, warmup_steps=warmup)
    for done in range(epochs * batches):
        rising = min(highest, first + (highest - first) * (done % batches) / max(warmup, 1))
        falling = (highest - lowest) * 0.5 * (1 + math.cos(math.pi * done / (epochs * batches))) + lowest
        assert learning_rate(of_ours, done) == (rising if done < warmup else falling)


def test_every_recorded_schedule_is_compared() -> None:
    assert {name for name, case in golden.content("golden/lr_schedule.json").items() if "points" in case} == set(CASES)


@pytest.mark.parametrize("name", ["accum1", "accum2", "max_txt_len_10"])
def test_updates_have_the_learning_rate_of_their_last_batch_and_take_what_an_epoch_left_over(name: str) -> None:
    run = golden.content("golden/train_steps.json")["runs"][name]
    options = dict(option.removeprefix("run.").split("=") for option in run["options"])
    accumulation = int(options.get("accum_grad_iters", 1))
    of_run = stage(
        schedule="linear_warmup_cosine_lr",
        steps=run["updates"],
        accumulation=accumulation,
        steps_per_epoch=run["iters_per_epoch"],
        learning_rate=float(options["init_lr"]),
        final_learning_rate=float(options["min_lr"]),
        warmup_learning_rate=float(options["warmup_lr"]),
        warmup_steps=int(options["warmup_steps"]),
    )
    rates = {(batch["epoch"], batch["iters"]): batch["lr"] for batch in run["steps"]}
    read = 0
    for step in range(run["updates"]):
        epoch, last = place_in_epoch(of_run, step)
        assert learning_rate(of_run, step) == pytest.approx(rates[epoch, last], rel=1e-12, abs=0)
        assert batches_before(of_run, step) == read
        read += num_batches(of_run, step)
        assert read == epoch * run["iters_per_epoch"] + last + 1


def test_the_rise_begins_anew_with_each_epoch_and_the_cosine_does_not() -> None:
    odd = stage(
        schedule="linear_warmup_cosine_lr", steps=24, steps_per_epoch=6, warmup_steps=15, warmup_learning_rate=1e-6
    )
    rates = [learning_rate(odd, step) for step in range(24)]
    assert rates[:6] == rates[6:12]
    assert rates[12:15] == rates[:3]
    assert rates[15] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 15 / 24)))
    assert all(before > after for before, after in pairwise(rates[15:]))


def test_cosine_rises_to_the_highest_and_falls_to_the_last() -> None:
    ours = stage(final_learning_rate=1e-5)
    rates = [learning_rate(ours, step) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == 1e-3
    assert all(before > after for before, after in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(1e-5)


@pytest.mark.parametrize(("lowest", "first"), [(0.0, 1e-4), (5e-4, 5.5e-4), (-1.0, 1e-3)])
def test_cosine_rises_from_the_warmup_learning_rate(lowest: float, first: float) -> None:
    assert learning_rate(stage(warmup_learning_rate=lowest), 0) == pytest.approx(first, rel=1e-12)


def test_cosine_without_a_rise_begins_at_the_highest() -> None:
    assert learning_rate(stage(warmup_steps=0), 0) == 1e-3


def test_only_the_originals_schedules_leave_batches_over() -> None:
    assert [num_batches(stage(accumulation=4, steps_per_epoch=10), step) for step in range(5)] == [4] * 5
    original = stage(accumulation=4, steps_per_epoch=10, schedule="linear_warmup_cosine_lr")
    assert [num_batches(original, step) for step in range(5)] == [4, 4, 6, 4, 6]
    assert [batches_before(original, step) for step in range(6)] == [0, 4, 8, 14, 18, 24]
    assert batches_before(stage(accumulation=4, steps_per_epoch=10), 5) == 20


def test_epoch_shorter_than_an_update_is_refused() -> None:
    with pytest.raises(ConfigError, match="have 3 batches, an update takes 4"):
        learning_rate(stage(accumulation=4, steps_per_epoch=3, schedule="linear_warmup_cosine_lr"), 0)


def test_a_rise_that_the_stage_does_not_see_the_end_of_is_told() -> None:
    """As in a recipe of few updates that leaves the 50 of warmup_steps as they are."""
    told = cut_rise(stage(steps=12, warmup_steps=50))
    assert (
        "rises over 50 updates (warmup_steps), and the stage has 12: 0.00024 is the highest it comes to, not 0.001"
        in told
    )
    assert cut_rise(stage(steps=50, warmup_steps=50)) == ""

    original = {"schedule": "linear_warmup_cosine_lr", "steps": 4, "steps_per_epoch": 4, "warmup_steps": 8}
    assert "rises over 8 batches (warmup_steps), and the stage has 4: 0.000375" in cut_rise(stage(**original))
    assert cut_rise(stage(**{**original, "accumulation": 2})) == ""
