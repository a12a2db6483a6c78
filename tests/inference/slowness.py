"""An engine as slow as a test needs: the tiny model says 900 tokens in 0.3 s, which ends before a busy test looks."""

import time

import torch

from minigpt4.inference.engine import Engine


def slow_steps(engine: Engine, seconds: float) -> None:
    """Have each step of the engine's answers (one token of each) last so many seconds longer."""
    step = engine._batch.step

    def slow_step(tokens: list[int]) -> torch.Tensor:
        time.sleep(seconds)
        return step(tokens)

    engine._batch.step = slow_step  # type: ignore[method-assign]
