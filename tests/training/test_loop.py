"""Training learns, changes only what it may, and goes on where it stopped as if it never had."""

import functools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigpt4.errors import DataError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training import checkpoint, run_folder
from minigpt4.training.loop import Progress, train
from minigpt4.training.objectives import TrainingStep
from minigpt4.training.optimizer_step import OptimizerStep
from minigpt4.training.processes import processes
from minigpt4.training.recipe import Recipe, StageRecipe
from minigpt4.training.run_folder import metrics_path
from minigpt4.training.schedule import learning_rate
from tests.training import toy

INITIAL_SCALE = 2.0**20
FP16_STAGES = [{"name": "only", "batch_size": 4, "learning_rate": 0.01, "threads": 1, "steps": 20}]


def lines_of(output: Path) -> list[dict[str, Any]]:
    """The figures of a run, in JSON as its standard has it: without `NaN` and `Infinity`."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = metrics_path(output).read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def trained(recipe: Recipe, stop_after: int | None = None) -> tuple[MiniGPT4ForConditionalGeneration, list[Progress]]:
    """Train a new model, or go on; `stop_after` so many updates of this call the run is torn down."""
    model = toy.model()
    watcher = toy.Watcher(stop_after)
    recipe.output.mkdir(parents=True, exist_ok=True)
    train(recipe, model, toy.ToyBatches, watcher, processes())
    return model, watcher.steps


def tensors(model: MiniGPT4ForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_loss_falls_until_the_examples_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "DROPOUT", 0.0)
    _, steps = trained(toy.longer(tmp_path, 40))

    assert steps[-1].loss < 0.1 * steps[0].loss
    assert steps[-1].accuracy > 0.9 > steps[0].accuracy


def test_only_what_is_trainable_changes(tmp_path: Path) -> None:
    before = tensors(toy.model())

    model, _ = trained(toy.recipe(tmp_path))

    changed = {name for name, value in tensors(model).items() if not torch.equal(value, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed <= trainable
    assert {"model.query_tokens", "model.language_projection.weight", "model.language_projection.bias"} <= changed
    assert not any(name.startswith(("model.language_model", "model.vision_model", "lm_head")) for name in trainable)
    assert not model.training


@pytest.mark.parametrize("checkpoint_steps", [1, 2])
def test_a_run_torn_down_at_any_step_ends_like_one_that_was_not(checkpoint_steps: int, tmp_path: Path) -> None:
    whole, steps = trained(toy.recipe(tmp_path / "whole", checkpoint_steps=checkpoint_steps))
    assert len(steps) == 6
    for stop_after in range(1, 7):
        recipe = toy.recipe(tmp_path / str(stop_after), checkpoint_steps=checkpoint_steps)
        with pytest.raises(toy.PowerFailureError):
            trained(recipe, stop_after)

        resumed, rest = trained(recipe)

        assert same(tensors(resumed), tensors(whole)), f"stopped after step {stop_after}"
        # Nothing is lost but what came after the last checkpoint; the end of a stage is one.
        assert len(rest) <= 6 - stop_after + checkpoint_steps


@pytest.mark.parametrize("left", ['{"stage": "fir', "\0\0\0\0\n"])
def test_what_a_crash_left_of_a_line_is_dropped(left: str, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, checkpoint_steps=1)
    with pytest.raises(toy.PowerFailureError):
        trained(recipe, 3)
    with metrics_path(tmp_path).open("a") as file:
        file.write(left)

    trained(recipe)

    lines = [(line["stage"], line["step"]) for line in lines_of(tmp_path)]
    assert lines == [(stage, step) for stage in ("first", "second") for step in (1, 2, 3)]


def test_lines_are_on_the_disk_before_the_checkpoint_of_their_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else, after the power failed, a run would go on without the figures of updates that it does not make again."""
    flushed = 0
    real, at_write = os.fsync, []

    def fsync(descriptor: int) -> None:
        nonlocal flushed
        if os.path.samestat(os.fstat(descriptor), metrics_path(tmp_path).stat()):
            flushed = os.fstat(descriptor).st_size
        real(descriptor)

    def write(*arguments: Any) -> Path:
        at_write.append(metrics_path(tmp_path).stat().st_size - flushed)
        return checkpoint.write_checkpoint(*arguments)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("minigpt4.training.loop.write_checkpoint", write)
    trained(toy.recipe(tmp_path, checkpoint_steps=2))

    assert at_write == [0, 0, 0, 0]  # after two updates of each stage, and after its end


def test_an_update_takes_its_own_time_and_that_of_its_examples_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a validation, a checkpoint or a line of figures takes is no update's; the clock moves where it is told."""
    now = 0.0

    def takes(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401  (as the work has them)
            nonlocal now
            now += seconds
            return work(*arguments, **options)

        return timed

    monkeypatch.setattr("minigpt4.training.loop.time.monotonic", lambda: now)
    monkeypatch.setattr("minigpt4.training.loop.write_checkpoint", takes(1000.0, checkpoint.write_checkpoint))
    monkeypatch.setattr("minigpt4.training.loop.append_line", takes(10.0, run_folder.append_line))
    monkeypatch.setattr(toy.Watcher, "on_validation", takes(100.0, toy.Watcher.on_validation))
    monkeypatch.setattr(toy.ToyBatches, "__getitem__", takes(1.0, toy.ToyBatches.__getitem__))
    monkeypatch.setattr("minigpt4.training.optimizer_step.OptimizerStep.__call__", takes(2.0, OptimizerStep.__call__))

    _, steps = trained(toy.recipe(tmp_path, checkpoint_steps=1))

    assert [step.seconds for step in steps] == [3.0] * 6
    assert [line["seconds"] for line in lines_of(tmp_path)] == [3.0] * 6
    assert now >= 6 * 1100


def best_of(output: Path, losses: list[float | None], stop_after: int | None = None, **changes: Any) -> str:
    """Train with these validation losses, one an update; returns the name of the best checkpoint."""
    output.mkdir(exist_ok=True)
    watcher = toy.Watcher(stop_after, losses)
    train(toy.recipe(output, **changes), toy.model(), toy.ToyBatches, watcher, processes())
    best = checkpoint.best_checkpoint(output)
    assert best is not None and best.exists()
    return best.name


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([1.0, 1.0, 1.0, 5.0, 4.0, 5.0], "stage1-step0000002"),  # the first stage's is another loss
        ([1.0, 1.0, 1.0, 5.0, 5.0, 4.0], "stage2-step0000000"),  # at the very end
        ([3.0, 2.0, 4.0, None, None, None], "stage0-step0000002"),
        ([3.0, 2.0, 1.0, None, None, None], "stage1-step0000000"),  # at the end of the first stage
        ([1.0, 1.0, 1.0, math.nan, 2.0, math.nan], "stage1-step0000002"),
    ],
)
def test_the_checkpoint_with_the_smallest_validation_loss_of_the_last_stage_is_kept_wherever_it_was(
    losses: list[float | None], best: str, tmp_path: Path
) -> None:
    assert best_of(tmp_path, losses, keep_checkpoints=1, checkpoint_steps=1) == best
    kept = {path.name for path in (tmp_path / run_folder.CHECKPOINT_FOLDER).iterdir() if path.is_dir()}
    assert kept == {best, "stage2-step0000000"}


def test_a_kill_between_the_best_checkpoint_and_its_mark_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise toy.PowerFailureError

    with monkeypatch.context() as patch, pytest.raises(toy.PowerFailureError):
        patch.setattr("minigpt4.training.loop.mark_best", killed)
        best_of(tmp_path, [1.0])

    losses = [5.0, 5.0, None, None, None]
    assert best_of(tmp_path, losses, keep_checkpoints=1, checkpoint_steps=1) == "stage0-step0000001"


@pytest.fixture
def too_large_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale of the loss in fp16 begins where the toy's gradients overflow, as a large model's do at the usual."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=INITIAL_SCALE)
    monkeypatch.setattr("minigpt4.training.loop.torch.amp.GradScaler", scaler)


@pytest.mark.usefixtures("too_large_a_scale")
def test_fp16_scales_the_loss_and_a_resumed_run_goes_on_with_the_scale(tmp_path: Path) -> None:
    whole, steps = trained(toy.recipe(tmp_path / "whole", precision="fp16", stages=FP16_STAGES))
    plain, _ = trained(toy.recipe(tmp_path / "plain", precision="fp32", stages=FP16_STAGES))
    recipe = toy.recipe(tmp_path / "torn", precision="fp16", checkpoint_steps=1, stages=FP16_STAGES)
    for _ in range(3):
        with pytest.raises(toy.PowerFailureError):
            trained(recipe, 6)
    found = checkpoint.last_checkpoint(recipe.output)
    assert found is not None and 0 < found[1].scaler["scale"] < INITIAL_SCALE

    resumed, _ = trained(recipe)

    assert any(step.skipped for step in steps) and not steps[-1].skipped
    assert same(tensors(resumed), tensors(whole))
    figures = [[line["loss"], line["skipped"]] for line in lines_of(tmp_path / "torn")]
    assert figures == [[line["loss"], line["skipped"]] for line in lines_of(tmp_path / "whole")]
    assert steps[0].loss == pytest.approx(lines_of(tmp_path / "plain")[0]["loss"], rel=1e-2)
    assert not same(tensors(whole), tensors(plain))


@pytest.mark.usefixtures("too_large_a_scale")
def test_finding_the_scale_of_fp16_is_no_reason_to_stop(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, precision="fp16", max_skipped_steps=0, stages=FP16_STAGES)

    _, steps = trained(recipe)

    assert steps[0].skipped and math.isfinite(steps[0].loss) and not math.isfinite(steps[0].grad_norm)
    assert lines_of(tmp_path)[0]["grad_norm"] is None
    assert not (tmp_path / "not_a_number.jsonl").exists()


def test_a_finished_run_has_nothing_more_to_do(tmp_path: Path) -> None:
    first, _ = trained(toy.recipe(tmp_path))

    again, steps = trained(toy.recipe(tmp_path))

    assert steps == []
    assert same(tensors(again), tensors(first))


def test_a_worker_gives_the_same_batches(tmp_path: Path) -> None:
    alone, _ = trained(toy.recipe(tmp_path / "alone"))
    helped, _ = trained(toy.recipe(tmp_path / "helped", workers=1))

    assert same(tensors(helped), tensors(alone))


def wild(output: Path, rate: float = 1e30, **changes: Any) -> Recipe:
    """A run of three updates that are well, and three at a learning rate with which weights leave all bounds."""
    stage = {"batch_size": 4, "threads": 1, "warmup_steps": 1, "steps": 3}
    stages = [{**stage, "name": "well", "learning_rate": 0.01}, {**stage, "name": "wild", "learning_rate": rate}]
    return toy.recipe(output, stages=stages, **changes)


def kept(output: Path) -> list[str]:
    """The checkpoints of a run, all of which hold numbers that can be computed with."""
    folders = sorted(path for path in (output / run_folder.CHECKPOINT_FOLDER).glob("*") if path.is_dir())
    for folder in folders:
        for name in ("trained.safetensors", "optimizer.safetensors"):
            assert all(tensor.abs().max() < 1e19 for tensor in load_file(folder / name).values())
    return [folder.name for folder in folders]


@pytest.mark.parametrize("checkpoint_steps", [1, 100])
def test_weights_that_cannot_be_computed_with_end_the_run_and_the_checkpoint_before_is_gone_on_from(
    checkpoint_steps: int, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"\w+ came to \d\.\d+e\+\d+ after step [12] of stage wild, ") as told:
        trained(wild(tmp_path, checkpoint_steps=checkpoint_steps))

    last = tmp_path / run_folder.CHECKPOINT_FOLDER / "stage1-step0000000"
    assert kept(tmp_path)[-1] == last.name
    assert f"then --force goes on from the last checkpoint, {last}, or" in told.value.hint
    resumed, steps = trained(wild(tmp_path, 0.01, checkpoint_steps=checkpoint_steps))
    whole, _ = trained(wild(tmp_path / "whole", 0.01, checkpoint_steps=checkpoint_steps))
    assert [step.stage for step in steps] == ["wild"] * 3
    assert same(tensors(resumed), tensors(whole))


@pytest.mark.parametrize("worst", [math.nan, -2e19])
def test_at_the_end_of_a_stage_weights_are_looked_at_as_well(worst: float, tmp_path: Path) -> None:
    class Poisoning(toy.Watcher):
        def on_validation(self, module: TrainingStep, stage: StageRecipe, step: int) -> None:
            if (stage.name, step) == ("second", 3):
                with torch.no_grad():
                    module.model.model.language_projection.weight[1, 2] = worst

    sign = "nan" if math.isnan(worst) else re.escape(f"{abs(worst):.3g}")
    with pytest.raises(DataError, match=rf"language_projection\.weight came to {sign} after step 3 of stage second"):
        train(toy.recipe(tmp_path), toy.model(), toy.ToyBatches, Poisoning(), processes())
    assert kept(tmp_path) == ["stage1-step0000000"]


def test_without_a_checkpoint_it_is_said_that_nothing_was_saved(tmp_path: Path) -> None:
    stage = {"name": "only", "batch_size": 4, "threads": 1, "learning_rate": 1e30, "steps": 9}
    with pytest.raises(DataError, match="after step 2 of stage only") as told:
        trained(toy.recipe(tmp_path, stages=[stage], max_skipped_steps=9))

    assert "nothing was saved" in told.value.hint
    assert kept(tmp_path) == []
    assert [line["skipped"] for line in lines_of(tmp_path)] == [False, True]  # at the first loss that is no number
    assert not (tmp_path / "not_a_number.jsonl").exists()  # the examples are not to blame


def test_moments_that_are_not_finite_are_not_written_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflown(*arguments: Any) -> dict[str, torch.Tensor]:
        return {name: value / 0 for name, value in checkpoint.optimizer_tensors(*arguments).items()}

    monkeypatch.setattr("minigpt4.training.loop.optimizer_tensors", overflown)
    with pytest.raises(DataError, match=r"\w+/\w+ came to (nan|inf) after step 2 of stage first"):
        trained(toy.recipe(tmp_path, checkpoint_steps=2))
    assert kept(tmp_path) == []


def test_a_learning_rate_that_32_bits_cannot_hold_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"the learning rate 1e\+38 of stage wild is more than 32 bits can hold"
    ) as told:
        trained(wild(tmp_path, 1e38))

    assert told.value.hint == "lower the learning rate"
    assert kept(tmp_path) == ["stage1-step0000000"]


def test_every_step_is_told_and_written(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)

    _, steps = trained(recipe)

    assert [(line["stage"], line["step"], line["loss"]) for line in lines_of(tmp_path)] == [
        (step.stage, step.step, step.loss) for step in steps
    ]
    assert [(step.stage, step.step, step.steps) for step in steps] == [
        *(("first", n, 3) for n in (1, 2, 3)),
        *(("second", n, 3) for n in (1, 2, 3)),
    ]
    assert [step.learning_rate for step in steps[:3]] == [learning_rate(recipe.stages[0], n) for n in range(3)]


def poisoned(steps: set[tuple[int, int]]) -> Callable[[int, StageRecipe], toy.ToyBatches]:
    class Poisoned(toy.ToyBatches):
        def __getitem__(self, item: int) -> dict[str, Any]:
            batch = super().__getitem__(item)
            if (self.number, item) in steps:
                batch["vision_outputs"].last_hidden_state[0] = math.nan
            return batch

    return Poisoned


def test_an_update_whose_loss_is_no_number_is_left_out(tmp_path: Path) -> None:
    watcher, model = toy.Watcher(), toy.model()
    train(toy.recipe(tmp_path), model, poisoned({(1, 1)}), watcher, processes())

    assert [step.skipped for step in watcher.steps] == [False] * 4 + [True, False]
    assert all(value.isfinite().all() for value in tensors(model).values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[4]["loss"] is None and lines[4]["skipped"]


def test_a_loss_that_stays_no_number_names_the_examples(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, max_skipped_steps=1)
    with pytest.raises(DataError, match="2 updates in a row, the last at step 2"):
        train(recipe, toy.model(), poisoned({(0, 0), (0, 1)}), toy.Watcher(), processes())

    line = json.loads((tmp_path / "not_a_number.jsonl").read_text())
    assert sorted(line["keys"]) == [f"picture {n}" for n in range(4)]
