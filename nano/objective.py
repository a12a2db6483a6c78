"""What nano's first stage trains: image embeddings that point along a caption's words.

It needs no language model: the image embeddings shall point where the embeddings of the caption's word pieces point,
one after another, so that a frozen language model finds a caption in its own words (in the place of BLIP-2's first
stage, arXiv 2301.12597, section 3.2).
"""

from typing import Any

import torch
from torch import nn

from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.objectives import Outcome, image_features, outcome_of

COSINE_SCALE = 20.0
"""Cosines are multiplied by this before the softmax; 1 would leave the target at most e times likelier than a rest."""


def words(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> Outcome:
    """Compare the caption's positions among the image embeddings with the caption.

    Args:
        model: The model.
        batch: Pictures; `labels` `(batch, 1 + positions)`, the caption's ids for the last positions of the picture,
            -100 in the first column and after the caption's end; `distractor_ids`, the vocabulary to tell them from.
    """
    targets = batch["labels"][:, 1:]
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
    return outcome_of(COSINE_SCALE * cosines, wanted)
