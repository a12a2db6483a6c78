"""An engine as slow as a test needs: the tiny model generates 900 tokens in 0.3 s, before a busy test looks."""

import time
from collections.abc import Sequence
from typing import Any

from minigpt4.inference.backends.protocol import Logits
from minigpt4.inference.engine import Engine


def slow_steps(engine: Engine, seconds: float) -> None:
    """Have each step of the engine's answers (one token of each) last so many seconds longer."""
    step = engine.backend.step

    def slow_step(slots: Sequence[Any], tokens: Sequence[int]) -> Logits:
        time.sleep(seconds)
        return step(slots, tokens)

    engine.backend.step = slow_step  # type: ignore[method-assign]
