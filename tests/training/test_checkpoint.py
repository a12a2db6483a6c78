"""A checkpoint holds all that a run needs to go on, and only that."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt4.errors import WeightsError
from minigpt4.training.checkpoint import (
    State,
    best_checkpoint,
    last_checkpoint,
    load_optimizer,
    load_trained,
    mark_best,
    optimizer_tensors,
    remove_old,
    trained_tensors,
    write_checkpoint,
)
from minigpt4.training.objectives import language
from minigpt4.training.optimizer_step import make_optimizer
from tests.training import toy

STATE = State(stage=1, step=7, skipped=2, recent_bad=[[1, 9]], groups={"a.tar": [3, 1]}, best_loss=0.5)


def saved(folder: Path, state: State = STATE) -> tuple[torch.nn.Module, torch.optim.Optimizer, Path]:
    """A model and its optimizer after one step, as they were saved."""
    model, stage = toy.model(), toy.recipe(folder).stages[0]
    optimizer = make_optimizer(model, stage)
    language(model, toy.ToyBatches(0, stage)[0]).loss.backward()
    optimizer.step()
    path = write_checkpoint(folder, trained_tensors(model), optimizer_tensors(model, optimizer), state)
    return model, optimizer, path


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer, path = saved(tmp_path)

    other = toy.model()
    other_optimizer = make_optimizer(other, toy.recipe(tmp_path).stages[0])
    load_trained(path, other)
    load_optimizer(path, other, other_optimizer)

    assert last_checkpoint(tmp_path) == (path, STATE)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    before, after = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert before.keys() == after.keys() and len(before) > 0
    for number, moments in before.items():
        assert moments.keys() == after[number].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(moments[key], after[number][key]) for key in moments)


def test_frozen_tensors_are_not_kept(tmp_path: Path) -> None:
    model, _, path = saved(tmp_path)

    stored = load_file(path / "trained.safetensors")

    assert stored.keys() == trained_tensors(model).keys()
    assert not any("language_model" in name or "vision_model" in name for name in stored)


def test_a_run_without_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_aloud(file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    *_, good = saved(tmp_path, State(stage=1, step=6))
    *_, bad = saved(tmp_path)
    flip_a_bit(bad / file)

    found = last_checkpoint(tmp_path)

    assert found == (good, State(stage=1, step=6))
    assert f"{bad.name} is damaged" in caplog.text and file in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path: Path) -> None:
    *_, path = saved(tmp_path)
    flip_a_bit(path / "trained.safetensors")

    with pytest.raises(WeightsError, match=r"no checkpoint of .* is whole: .*trained\.safetensors"):
        last_checkpoint(tmp_path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_of_other_trained_parts_is_refused(tmp_path: Path) -> None:
    *_, path = saved(tmp_path)
    model = toy.model()
    model.model.query_tokens.requires_grad_(False)

    with pytest.raises(WeightsError, match=r"differ in the trained tensor model\.query_tokens"):
        load_trained(path, model)


def test_a_checkpoint_of_a_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    """As after `--force` with another model."""
    _, _, path = saved(tmp_path)
    other = toy.model()
    projection = other.model.language_projection
    projection.weight = torch.nn.Parameter(projection.weight[:, :8].detach())

    with pytest.raises(
        WeightsError, match=r"the shape of model\.language_projection\.weight: .*, now \[\d+, 8\]"
    ) as told:
        load_trained(path, other)
    assert "another model" in told.value.hint


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    paths = [saved(tmp_path, State(stage=stage, step=step))[2] for stage, step in [(0, 2), (0, 9), (0, 10), (1, 1)]]
    mark_best(tmp_path, paths[0].name)

    remove_old(tmp_path, State(stage=1, step=1, best=paths[0].name), keep=2)

    assert [path.exists() for path in paths] == [True, False, True, True]
    assert best_checkpoint(tmp_path) == paths[0]
    assert last_checkpoint(tmp_path) == (paths[3], State(stage=1, step=1))  # by number, not by name or time


def test_a_damaged_later_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    *_, whole = saved(tmp_path, State(stage=0, step=8))
    *_, damaged = saved(tmp_path, State(stage=0, step=10))
    flip_a_bit(damaged / "state.json")
    *_, written = saved(tmp_path, State(stage=0, step=9))  # it went on from the whole one

    remove_old(tmp_path, State(stage=0, step=9), keep=1)

    assert not whole.exists()
    assert last_checkpoint(tmp_path) == (written, State(stage=0, step=9))
