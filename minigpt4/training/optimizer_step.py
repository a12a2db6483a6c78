"""One optimizer step: forward and backward over its batches, clipping and AdamW, in all processes together."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from minigpt4.data.batches import lacks_memory
from minigpt4.errors import ConfigError, DataError
from minigpt4.training.objectives import Outcome, num_targets
from minigpt4.training.processes import full_norm, summed, unsynchronised
from minigpt4.training.recipe import Recipe, StageRecipe

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Figures:
    """Figures of a step over all processes.

    Args:
        loss: Per target token, or per batch (`loss_over`).
        accuracy: Share of targets that are the likeliest token.
        grad_norm: Of all gradients together, before clipping.
        tokens: Targets.
        images: Pictures.
        skipped: The weights did not change, since the loss or a gradient is not a number.
        rescaled: So because of too large a scale of the loss in `fp16`, which is halved now; the loss itself is finite.
        stop: A process got a signal to stop.
    """

    loss: float
    accuracy: float
    grad_norm: float
    tokens: int
    images: int
    skipped: bool
    rescaled: bool
    stop: bool


@dataclass
class OptimizerStep:
    """The optimizer steps of one stage.

    Args:
        module: A `TrainingStep`, perhaps spread over processes.
        optimizer: Over the trainable parameters.
        scaler: Of the loss, enabled in `fp16`.
        stage: The stage.
        precision: Of autocast; None for float32.
        state: The processes.
    """

    module: nn.Module
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    stage: StageRecipe
    precision: torch.dtype | None
    state: PartialState

    def __call__(self, batches: Sequence[dict[str, Any]], rate: float, *, stop: bool = False) -> Figures:
        """Make one step.

        Args:
            batches: This process's, `accumulation` of them, on the CPU.
            rate: The learning rate.
            stop: This process got a signal to stop, and the others stop with it.

        Raises:
            DataError: The learning rate is more than the weights' numbers can hold.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        here = sum(num_targets(batch) for batch in batches)
        images = sum(_num_images(batch) for batch in batches)
        targets, pictures, stops = summed([here, images, float(stop)], self.state)
        self.optimizer.zero_grad(set_to_none=True)
        losses, hits = 0.0, 0.0
        for number, batch in enumerate(batches):
            with unsynchronised(self.module, last=number == len(batches) - 1):
                outcome = self._forward(batch)
                divisor = self._divisor(batch, targets)
                self.scaler.scale(outcome.loss / divisor).backward()
            losses += outcome.loss.item() / self._reported_divisor(batch, targets, len(batches))
            hits += outcome.hits.item()
        loss, right = summed([losses, hits], self.state)
        norm = self._clipped()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            self._step(rate)
        rescaled = skipped and math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() > 1
        self.scaler.update()
        return Figures(loss, right / max(targets, 1), norm, int(targets), int(pictures), skipped, rescaled, stops > 0)

    def _step(self, rate: float) -> None:
        try:
            self.scaler.step(self.optimizer)
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            raise DataError(
                f"the learning rate {rate:g} of stage {self.stage.name} is more than 32 bits can hold in an update",
                hint="lower the learning rate",
            ) from error

    def _forward(self, batch: dict[str, Any]) -> Outcome:
        device = self.state.device
        with torch.autocast(device.type, dtype=self.precision, enabled=self.precision is not None):
            outcome: Outcome = self.module(to_device(batch, device))
        return outcome

    def _divisor(self, batch: dict[str, Any], targets: float) -> float:
        """Return what a batch's summed loss is divided by; gradients are averaged over processes afterwards."""
        if self.stage.loss_over == "batch":
            return max(num_targets(batch), 1)
        return max(targets, 1) / self.state.num_processes

    def _reported_divisor(self, batch: dict[str, Any], targets: float, batches: int) -> float:
        if self.stage.loss_over == "batch":
            return max(num_targets(batch), 1) * batches * self.state.num_processes
        return max(targets, 1)

    def _clipped(self) -> float:
        """Clip the gradients, and return the norm they had."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return full_norm(nn.utils.clip_grad_norm_(parameters, self.stage.clip_norm or math.inf))


@contextmanager
def memory_for(what: str, hint: str) -> Iterator[None]:
    """Turn the many errors of the libraries about too little memory into one sentence.

    Raises:
        ConfigError: There was not enough memory for `what`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise ConfigError(f"there was not enough memory for {what}", hint=hint) from error


def chosen_precision(recipe: Recipe, device: torch.device) -> str:
    """Return what `precision: auto` means on a device."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def make_optimizer(module: nn.Module, stage: StageRecipe) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, without decay of vectors.

    The original leaves out, besides, whatever has "bias", "ln" or "bn" in its name; all of that are vectors.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.learning_rate, betas=stage.betas)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors, also those inside a model's output."""
    return {key: _moved(value, device) for key, value in batch.items()}


def _moved(value: Any, device: torch.device) -> Any:  # noqa: ANN401  (whatever a batch holds)
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if hasattr(value, "items") and not isinstance(value, dict):  # a model's output
        return type(value)(**{key: _moved(inner, device) for key, inner in value.items()})
    return value


def _num_images(batch: dict[str, Any]) -> int:
    for key in ("pixel_values", "qformer_outputs"):
        if key in batch:
            return len(batch[key])
    return len(batch["vision_outputs"].last_hidden_state) if "vision_outputs" in batch else 0
