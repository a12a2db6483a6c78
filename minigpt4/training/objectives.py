"""What the joining parts are trained to do.

`language` is MiniGPT-4's objective: the language model says the answer. Another one is a function from model and batch
to an `Outcome`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.model.modeling_minigpt4 import MiniGPT4ImageFeatures
from minigpt4.training.beginnings import Beginning, Beginnings
from minigpt4.training.branches import branches


@dataclass(frozen=True)
class Outcome:
    """What a batch came to.

    Args:
        loss: Sum over its targets; a gradient can be taken.
        hits: Targets that would have been said.
    """

    loss: Tensor
    hits: Tensor


Objective = Callable[[MiniGPT4ForConditionalGeneration, dict[str, Any]], Outcome]
"""Computes a batch's loss. The targets are the batch's `labels`: see `num_targets`."""


class TrainingStep(nn.Module):
    """A model with its objective, from a batch to a loss; one module, as wrapping for several processes needs it.

    Args:
        model: The model.
        objective: Its objective, which each stage sets; None is `language`.
    """

    def __init__(self, model: MiniGPT4ForConditionalGeneration, objective: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self._beginnings = Beginnings()

    def forward(self, batch: dict[str, Any]) -> Outcome:
        """Compute a batch's loss.

        Args:
            batch: What the objective reads, and the pictures as `pixel_values`, as `vision_outputs` (what the vision
                encoder made of them), or as `qformer_outputs` (what the projection reads).
        """
        if self.objective is not None:
            return self.objective(self.model, batch)
        return language(self.model, batch | {"beginning": self._beginnings.of(self.model, batch)})


def image_features(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> MiniGPT4ImageFeatures | None:
    """Bring a batch's pictures into the language model's space, from as far as they have come; None without any."""
    if "qformer_outputs" in batch:
        return MiniGPT4ImageFeatures(pooler_output=model.model.language_projection(batch["qformer_outputs"]))
    if "vision_outputs" in batch:
        return model.model.align_image_features(batch["vision_outputs"])
    if "pixel_values" in batch:
        return model.model.get_image_features(batch["pixel_values"], return_dict=True)
    return None


def language(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> Outcome:
    """Let the frozen language model say the answers; only their places get logits.

    Args:
        model: The model.
        batch: Pictures; `input_ids` and `labels` `(batch, length)`, padded on the right, -100 outside answers. No
            place reads what comes after it, so padding there needs no mask, and the last place, which is only said,
            is not read. With several texts in a row also `branch_ids` and `position_ids` `(batch, length)`.
            `beginning`, where it is given, was read before.
    """
    features = image_features(model, batch)
    beginning: Beginning | None = batch.get("beginning")
    first = beginning.length if beginning else 0
    read: dict[str, Any] = {
        name: batch[name][:, :-1] for name in ("input_ids", "branch_ids", "position_ids") if name in batch
    }
    hidden = model.model(
        input_ids=read["input_ids"][:, first:],
        mm_encoder_outputs={"image": features} if features is not None else None,
        past_key_values=beginning.cache(len(batch["input_ids"])) if beginning else None,
        use_cache=False,
        **branches(model, read, first),
    ).last_hidden_state
    targets = batch["labels"][:, first + 1 :]
    outcome = outcome_of(model.compute_logits(hidden[targets != -100]), targets[targets != -100])
    if features is not None:
        return outcome
    # Text alone teaches the joining parts nothing, and other processes wait for their gradients.
    nothing = sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)
    return Outcome(outcome.loss + nothing, outcome.hits)


def outcome_of(logits: Tensor, targets: Tensor) -> Outcome:
    """Return the cross entropy of scores `(targets, classes)` for targets `(targets,)`, and how many are hit."""
    loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return Outcome(loss, (logits.argmax(dim=-1) == targets).sum())


def num_targets(batch: dict[str, Any]) -> int:
    """Return how many targets a batch has: its `labels`, without the first place, which nothing comes before."""
    return int((batch["labels"][:, 1:] != -100).sum())
