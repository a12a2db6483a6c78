"""What the joining parts are trained to do.

`words` needs no language model: the image embeddings shall point where the embeddings of the caption's word pieces
point, one after another, so that a frozen language model finds a caption in its own words (in the place of BLIP-2's
first stage, arXiv 2301.12597, section 3.2). `language` is MiniGPT-4's: the language model shall say the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.model.modeling_minigpt4 import MiniGPT4ImageFeatures
from minigpt4.training.beginnings import Beginning, Beginnings
from minigpt4.training.branches import branches

COSINE_SCALE = 20.0
"""Cosines are multiplied by this before the softmax; 1 would leave the target at most e times likelier than a rest."""


@dataclass(frozen=True)
class Outcome:
    """What a batch came to.

    Args:
        loss: Sum over its targets; a gradient can be taken.
        hits: Targets that would have been said.
    """

    loss: Tensor
    hits: Tensor


class TrainingStep(nn.Module):
    """A model with its objective, from a batch to a loss; one module, as wrapping for several processes needs it.

    Args:
        model: The model.
        objective: A key of `OBJECTIVES`; each stage sets its own.
    """

    def __init__(self, model: MiniGPT4ForConditionalGeneration, objective: str = "language") -> None:
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
        if self.objective == "language":
            batch = batch | {"beginning": self._beginnings.of(self.model, batch)}
        return OBJECTIVES[self.objective](self.model, batch)


def image_features(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> MiniGPT4ImageFeatures | None:
    """Bring a batch's pictures into the language model's space, from as far as they have come; None without any."""
    if "qformer_outputs" in batch:
        return MiniGPT4ImageFeatures(pooler_output=model.model.language_projection(batch["qformer_outputs"]))
    if "vision_outputs" in batch:
        return model.model.align_image_features(batch["vision_outputs"])
    if "pixel_values" in batch:
        return model.model.get_image_features(batch["pixel_values"], return_dict=True)
    return None


def words(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> Outcome:
    """Compare the caption's places among the image embeddings with the caption.

    Args:
        model: The model.
        batch: Pictures; `word_ids` `(batch, places)`, -100 after the caption's end, for the last places; and
            `distractor_ids`, the vocabulary to tell them from.
    """
    targets = batch["word_ids"]
    features = image_features(model, batch)
    if features is None or features.pooler_output is None:
        raise ValueError("the objective words needs pictures")
    said = features.pooler_output[:, -targets.shape[1] :][targets != -100]
    candidates, wanted = torch.unique(
        torch.cat([targets[targets != -100], batch["distractor_ids"]]), return_inverse=True
    )
    wanted = wanted[: len(said)]
    table = model.get_input_embeddings().weight
    mean = table.mean(dim=0)
    cosines = nn.functional.normalize(said - mean, dim=-1) @ nn.functional.normalize(table[candidates] - mean, dim=-1).T
    return _outcome(COSINE_SCALE * cosines, wanted)


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
    outcome = _outcome(model.compute_logits(hidden[targets != -100]), targets[targets != -100])
    if features is not None:
        return outcome
    # Text alone teaches the joining parts nothing, and other processes wait for their gradients.
    nothing = sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)
    return Outcome(outcome.loss + nothing, outcome.hits)


def _outcome(logits: Tensor, targets: Tensor) -> Outcome:
    loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return Outcome(loss, (logits.argmax(dim=-1) == targets).sum())


OBJECTIVES: dict[str, Callable[[MiniGPT4ForConditionalGeneration, dict[str, Any]], Outcome]] = {
    "words": words,
    "language": language,
}


def num_targets(batch: dict[str, Any]) -> int:
    """Return how many targets a batch has: without the first place, which nothing comes before."""
    targets = batch["word_ids"] if "word_ids" in batch else batch["labels"][:, 1:]
    return int((targets != -100).sum())
