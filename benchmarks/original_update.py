"""The original's update of training, from the description of its algorithm: `training_step.py` compares with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minigpt4.data.examples import IGNORED
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.objectives import Outcome

Batch = dict[str, Any]


class OriginalStep(nn.Module):
    """The original's way from a batch to a loss, from the description of its algorithm."""

    def __init__(self, model: MiniGPT4ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Outcome:
        joined = self.model.model
        with torch.no_grad():
            seen = joined.vision_model(batch["pixel_values"], return_dict=True)
        pictures = joined.align_image_features(seen).pooler_output
        ids = batch["input_ids"]
        words = joined.get_input_embeddings()(ids)
        first = int((ids[0] == self.model.config.image_token_id).nonzero()[0])  # one prompt for a whole batch
        after = words[:, first + pictures.shape[1] :]
        embeddings = torch.cat([words[:, :first], pictures.to(words.dtype), after], dim=1)
        hidden = joined.language_model(
            inputs_embeds=embeddings, attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        logits = self.model.lm_head(hidden).float()[:, :-1].contiguous()
        targets = batch["labels"][:, 1:].contiguous()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return Outcome(loss, torch.zeros(()))


class MaskedStep(nn.Module):
    """The same with logits for the targets alone."""

    def __init__(self, model: MiniGPT4ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Outcome:
        hidden = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
            use_cache=False,
        ).last_hidden_state[:, :-1]
        targets = batch["labels"][:, 1:]
        logits = self.model.lm_head(hidden[targets != IGNORED]).float()
        loss = nn.functional.cross_entropy(logits, targets[targets != IGNORED], reduction="sum")
        return Outcome(loss, torch.zeros(()))


def original_update(
    step: OriginalStep, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None
) -> Callable[[Batch], None]:
    """The original's update, which looks neither at the gradient's length nor at what would have been said.

    Args:
        step: From a batch to a loss.
        optimizer: Of what learns.
        dtype: Of the computation; None for float32.
    """

    def update(batch: Batch) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = step(batch).loss
        (loss / (batch["labels"] != IGNORED).sum()).backward()
        optimizer.step()

    return update
