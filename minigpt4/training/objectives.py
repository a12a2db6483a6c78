"""What the joining parts are trained to do.

`word_loss` needs no language model: the image embeddings shall point where the embeddings of the caption's word pieces
point, one after another, so that a frozen language model finds a caption in its own words (in the place of BLIP-2's
first stage, arXiv 2301.12597, section 3.2). `language_loss` is MiniGPT-4's: the language model shall say the answer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.model import MiniGPT4ForConditionalGeneration

COSINE_SCALE = 20.0
"""Cosines are multiplied by this before the softmax; 1 would leave the target at most e times likelier than a rest."""


def word_loss(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Compare the caption's places among the image embeddings with the caption.

    Args:
        model: The model.
        batch: `vision_outputs`; `word_ids` `(batch, places)`, -100 after the caption's end, for the last places; and
            `distractor_ids`, the vocabulary to tell them from.

    Returns:
        The loss, and the share of word pieces that come out nearest as `word_accuracy`.
    """
    targets = batch["word_ids"]
    image_embeds = model.model.align_image_features(batch["vision_outputs"]).pooler_output
    said = image_embeds[:, -targets.shape[1] :][targets != -100]
    candidates, wanted = torch.unique(
        torch.cat([targets[targets != -100], batch["distractor_ids"]]), return_inverse=True
    )
    wanted = wanted[: len(said)]
    table = model.get_input_embeddings().weight
    mean = table.mean(dim=0)
    cosines = nn.functional.normalize(said - mean, dim=-1) @ nn.functional.normalize(table[candidates] - mean, dim=-1).T
    loss = nn.functional.cross_entropy(COSINE_SCALE * cosines, wanted)
    return loss, {"word_accuracy": (cosines.argmax(dim=-1) == wanted).float().mean().item()}


def language_loss(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Let the frozen language model say the answers; only their places get logits.

    Args:
        model: The model.
        batch: `vision_outputs`, `input_ids`, `attention_mask` and `labels` `(batch, length)`, -100 outside answers.

    Returns:
        The loss a target token, and the share of tokens it would have said itself as `token_accuracy`.
    """
    features = model.model.align_image_features(batch["vision_outputs"])
    hidden = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        mm_encoder_outputs={"image": features},
        use_cache=False,
    ).last_hidden_state
    targets = batch["labels"][:, 1:]
    logits = model.lm_head(hidden[:, :-1][targets != -100])
    targets = targets[targets != -100]
    loss = nn.functional.cross_entropy(logits.float(), targets)
    return loss, {"token_accuracy": (logits.argmax(dim=-1) == targets).float().mean().item()}


OBJECTIVES = {"words": word_loss, "language": language_loss}
