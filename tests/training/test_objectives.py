"""What the two objectives ask for, checked against plain arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.objectives import COSINE_SCALE, OBJECTIVES, language, num_targets, words
from tests.training import toy


@pytest.fixture(scope="module")
def model() -> MiniGPT4ForConditionalGeneration:
    return toy.model()


def batch(objective: str) -> dict[str, Any]:
    stage = toy.longer(Path("out"), objective, 3).stages[0]
    return toy.ToyBatches(0, stage)[0]


def test_word_loss_is_the_cosine_to_the_captions_pieces(model: MiniGPT4ForConditionalGeneration) -> None:
    given = batch("words")
    table = model.get_input_embeddings().weight
    mean = table.mean(dim=0)
    ids = given["word_ids"]
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


def test_language_loss_is_the_models_own(model: MiniGPT4ForConditionalGeneration) -> None:
    given = batch("language")
    features = model.model.align_image_features(given["vision_outputs"])

    outcome = language(model, given)

    output = model(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        labels=given["labels"],
        mm_encoder_outputs={"image": features},
    )
    targets = given["labels"][:, 1:]
    said = output.logits[:, :-1].argmax(dim=-1)
    hits = (said == targets)[targets != -100].sum().item()
    count = num_targets(given)
    assert outcome.loss.item() / count == pytest.approx(output.loss.item(), abs=1e-5)
    assert (outcome.hits.item(), count) == (hits, int((targets != -100).sum()))


@pytest.mark.parametrize("objective", ["words", "language"])
def test_gradients_reach_every_trainable_part_and_nothing_else(
    objective: str, model: MiniGPT4ForConditionalGeneration
) -> None:
    model.zero_grad(set_to_none=True)
    OBJECTIVES[objective](model, batch(objective)).loss.backward()

    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = {name.removeprefix("model.").partition(".")[0] for name in reached}
    assert parts == {"query_tokens", "qformer", "language_projection"}
    model.zero_grad(set_to_none=True)
