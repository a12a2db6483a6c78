"""A checkpoint holds all that a run needs to go on, and only that."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt4.errors import WeightsError
from minigpt4.training.checkpoint import (
    Position,
    load_optimizer,
    load_position,
    load_trained,
    save_checkpoint,
    trained_tensors,
)
from minigpt4.training.loop import make_optimizer
from minigpt4.training.objectives import OBJECTIVES
from tests.training import toy


def saved(folder: Path) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after one step, as they were saved."""
    model, stage = toy.model(), toy.recipe(folder).stages[0]
    optimizer = make_optimizer(model, stage)
    loss, _ = OBJECTIVES["words"](model, toy.ToyBatches(0, stage)[0])
    loss.backward()
    optimizer.step()
    save_checkpoint(folder, model, optimizer, Position(1, 7))
    return model, optimizer


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path)

    other = toy.model()
    other_optimizer = make_optimizer(other, toy.recipe(tmp_path).stages[0])
    load_trained(tmp_path, other)
    load_optimizer(tmp_path, other, other_optimizer)

    assert load_position(tmp_path) == Position(1, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    before, after = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert before.keys() == after.keys() and len(before) > 0
    for number, moments in before.items():
        assert moments.keys() == after[number].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(moments[key], after[number][key]) for key in moments)


def test_frozen_tensors_are_not_kept(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)

    stored = load_file(tmp_path / "checkpoint" / "trained.safetensors")

    assert stored.keys() == trained_tensors(model).keys()
    assert not any("language_model" in name or "vision_model" in name for name in stored)


def test_a_run_without_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    assert load_position(tmp_path) is None


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "position.json"])
def test_a_flipped_bit_is_refused(file: str, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "checkpoint" / file
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)

    with pytest.raises(WeightsError, match=file):
        load_position(tmp_path)


def test_a_newer_checkpoint_replaces_an_older_one(tmp_path: Path) -> None:
    model, optimizer = saved(tmp_path)

    save_checkpoint(tmp_path, model, optimizer, Position(2, 0))

    assert load_position(tmp_path) == Position(2, 0)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["checkpoint"]
