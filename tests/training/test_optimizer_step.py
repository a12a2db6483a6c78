"""A step weighs every target token the same, however many batches it is read in; as the original, every batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt4.errors import ConfigError
from minigpt4.training.objectives import TrainingStep
from minigpt4.training.optimizer_step import Figures, OptimizerStep, make_optimizer
from minigpt4.training.processes import processes
from tests.training import toy
from tests.training.test_loop import trained


def rows(batch: dict[str, Any], chosen: slice, targets: int) -> dict[str, Any]:
    """Some rows of a batch, with the loss taken at so many of the last places."""
    seen = batch["vision_outputs"]
    part = {key: value[chosen] for key, value in batch.items() if key in ("input_ids", "attention_mask", "labels")}
    part["labels"] = part["labels"].clone()
    part["labels"][:, : part["labels"].shape[1] - targets] = -100
    return {**part, "vision_outputs": type(seen)(**{key: value[chosen] for key, value in seen.items()})}


def joined(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    seen, other = one["vision_outputs"], two["vision_outputs"]
    batch = {key: torch.cat([one[key], two[key]]) for key in ("input_ids", "attention_mask", "labels")}
    return {
        **batch,
        "vision_outputs": type(seen)(**{key: torch.cat([value, other[key]]) for key, value in seen.items()}),
    }


def gradients(
    batches: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[dict[str, Tensor], Figures]:
    monkeypatch.setattr(toy, "DROPOUT", 0.0)
    stage = toy.longer(folder, 1).stages[0].model_copy(update={"clip_norm": None, **changes})
    step = TrainingStep(toy.model())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    figures = OptimizerStep(step, make_optimizer(step, stage), scaler, stage, None, processes())(
        batches, 1e-3, stop=False
    )
    return {name: p.grad for name, p in step.named_parameters() if p.grad is not None}, figures


def test_batches_of_unlike_many_targets_add_up_to_the_one_they_are_parts_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toy.ToyBatches(0, toy.longer(tmp_path, 1).stages[0])[0]
    few, many = rows(whole, slice(0, 1), 1), rows(whole, slice(1, 4), 2)

    apart, figures = gradients([few, many], tmp_path, monkeypatch)
    together, expected = gradients([joined(few, many)], tmp_path, monkeypatch)
    original, _ = gradients([few, many], tmp_path, monkeypatch, loss_over="batch")

    assert figures.tokens == expected.tokens == 7
    assert figures.loss == pytest.approx(expected.loss, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in together.values())
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-4, atol=1e-5 * largest)
    assert any((original[name] - gradient).abs().max() > 0.01 * largest for name, gradient in together.items())


@pytest.mark.parametrize(
    "words", [None, "CUDA out of memory. Tried to allocate 2.00 GiB", "MPS backend out of memory"], ids=str
)
def test_too_little_memory_for_an_update_is_told_with_what_helps(
    words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any) -> None:
        if words is None:
            torch.empty(2**60, dtype=torch.uint8)
        raise RuntimeError(words) if "MPS" in str(words) else torch.OutOfMemoryError(words)

    monkeypatch.setattr(TrainingStep, "forward", forward)
    with pytest.raises(
        ConfigError, match=r"not enough memory for an update of stage first, 4 examples at once"
    ) as told:
        trained(toy.recipe(tmp_path))

    assert "accumulation" in told.value.hint


def test_vectors_are_not_decayed(tmp_path: Path) -> None:
    model = toy.model()

    decayed, plain = make_optimizer(model, toy.recipe(tmp_path).stages[0]).param_groups

    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == sum(p.requires_grad for p in model.parameters())
