"""A training run of seconds: a tiny model, two stages, and made-up pictures that each have something to say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.model.vision_efficientnet_lite import EfficientNetLiteOutput
from minigpt4.training.checkpoint import State
from minigpt4.training.loop import Callbacks, Progress
from minigpt4.training.objectives import TrainingStep
from minigpt4.training.recipe import Recipe, StageRecipe
from tests.model import tiny

NUM_EXAMPLES = 4
NUM_WORDS = 2
DROPOUT = 0.05


def model() -> MiniGPT4ForConditionalGeneration:
    """The same random model each time; its Q-Former drops out, so a resumed run needs the same random numbers."""
    config = tiny.config(vision="efficientnet_lite", trainable_parts=["query_tokens", "qformer", "language_projection"])
    config.qformer_config.hidden_dropout_prob = config.qformer_config.attention_probs_dropout_prob = DROPOUT
    torch.manual_seed(0)
    return tiny.randomized(MiniGPT4ForConditionalGeneration(config)).eval()


class ToyBatches(Dataset[dict[str, Any]]):
    """The batch of a step: all examples in an order of its own, each picture with its own words."""

    def __init__(self, number: int, stage: StageRecipe) -> None:
        self.number = number
        self.stage = stage

    def __len__(self) -> int:
        return self.stage.steps * self.stage.accumulation

    def __getitem__(self, step: int) -> dict[str, Any]:
        seen = torch.Generator().manual_seed(5)
        vision = tiny.config(vision="efficientnet_lite").vision_config
        tokens = torch.randn(NUM_EXAMPLES, 16, vision.hidden_size, generator=seen)
        concepts = torch.randn(NUM_EXAMPLES, vision.num_concept_tokens, vision.concept_size, generator=seen)
        order = torch.randperm(NUM_EXAMPLES, generator=torch.Generator().manual_seed(100 * self.number + step))
        outputs = EfficientNetLiteOutput(last_hidden_state=tokens[order], concept_embeds=concepts[order])
        words = torch.arange(10, 10 + NUM_EXAMPLES * NUM_WORDS).view(NUM_EXAMPLES, NUM_WORDS)[order]
        prompt = torch.tensor([1, *[tiny.IMAGE_TOKEN_ID] * tiny.NUM_IMAGE_TOKENS, 7]).expand(NUM_EXAMPLES, -1)
        ids = torch.cat([prompt, words], dim=1)
        labels = torch.cat([torch.full_like(prompt, -100), words], dim=1)
        mask = torch.ones_like(ids)
        keys = [f"picture {number}" for number in order.tolist()]
        return {"vision_outputs": outputs, "input_ids": ids, "attention_mask": mask, "labels": labels, "keys": keys}


class Watcher(Callbacks):
    """Keeps what it is called with; after `stop_after` updates the run is torn down."""

    def __init__(self, stop_after: int | None = None, losses: Sequence[float | None] = ()) -> None:
        self.steps: list[Progress] = []
        self.stop_after = stop_after
        self.losses = list(losses)
        self.told = 0
        self.went_on: list[tuple[int, int]] = []

    def on_resume(self, state: State) -> None:
        self.went_on.append((state.stage, state.step))

    def on_update(self, progress: Progress) -> None:
        self.steps.append(progress)
        if len(self.steps) == self.stop_after:
            raise PowerFailureError

    def on_stop_request(self) -> None:
        self.told += 1

    def on_validation(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        return self.losses.pop(0) if self.losses else None


class PowerFailureError(Exception):
    """The power fails."""


def recipe(output: Path, **changes: Any) -> Recipe:
    """Two stages of three steps."""
    stage = {"batch_size": NUM_EXAMPLES, "learning_rate": 0.01, "warmup_steps": 1, "threads": 1, "steps": 3}
    stages = [{"name": "first", **stage}, {"name": "second", **stage}]
    values = {
        "model": "nano",
        "output": output,
        "data": {"sources": [{"path": "none"}]},
        "stages": stages,
        "workers": 0,
    }
    return Recipe.model_validate({**values, **changes})


def longer(output: Path, steps: int) -> Recipe:
    """One stage, long enough to learn by heart."""
    stage = {"name": "only", "batch_size": NUM_EXAMPLES, "learning_rate": 0.01, "threads": 1}
    return recipe(output, stages=[{**stage, "steps": steps, "warmup_steps": 2}])
