"""What nano's first objective asks for, checked against plain arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.objectives import num_targets
from nano.objective import COSINE_SCALE, words
from tests.training import toy


@pytest.fixture(scope="module")
def model() -> MiniGPT4ForConditionalGeneration:
    return toy.model()


def batch() -> dict[str, Any]:
    pictures = toy.ToyBatches(0, toy.longer(Path("out"), 3).stages[0])[0]["vision_outputs"]
    ids = torch.arange(10, 10 + toy.NUM_EXAMPLES * toy.NUM_WORDS).view(toy.NUM_EXAMPLES, toy.NUM_WORDS)
    ids[0, -1] = -100  # a shorter caption
    labels = torch.nn.functional.pad(ids, (1, 0), value=-100)
    return {"vision_outputs": pictures, "labels": labels, "distractor_ids": torch.arange(40, 60)}


def test_word_loss_is_the_cosine_to_the_captions_pieces(model: MiniGPT4ForConditionalGeneration) -> None:
    given = batch()
    table = model.get_input_embeddings().weight
    mean = table.mean(dim=0)
    ids = given["labels"][:, 1:]
    embeds = model.model.align_image_features(given["vision_outputs"]).pooler_output[:, -ids.shape[1] :]
    candidates = sorted({*ids[ids != -100].tolist(), *given["distractor_ids"].tolist()})

    losses, hits = [], []
    for row, places in enumerate(ids.tolist()):
        for place, word in enumerate(places):
            if word == -100:
                continue
            cosines = cosine_similarity(embeds[row, place] - mean, table[candidates] - mean)
            losses.append(cross_entropy(COSINE_SCALE * cosines, torch.tensor(candidates.index(word))))
            hits.append(float(candidates[int(cosines.argmax())] == word))
    outcome = words(model, given)

    assert outcome.loss.item() == pytest.approx(torch.stack(losses).sum().item(), abs=1e-3)
    assert (outcome.hits.item(), num_targets(given)) == (sum(hits), len(hits))


def test_gradients_reach_every_trainable_part_and_nothing_else(model: MiniGPT4ForConditionalGeneration) -> None:
    model.zero_grad(set_to_none=True)
    words(model, batch()).loss.backward()

    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = {name.removeprefix("model.").partition(".")[0] for name in reached}
    assert parts == {"query_tokens", "qformer", "language_projection"}
