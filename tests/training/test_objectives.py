"""What the objective asks for, checked against the model's own loss."""

from pathlib import Path
from typing import Any

import pytest

from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.objectives import language, num_targets
from tests.training import toy


@pytest.fixture(scope="module")
def model() -> MiniGPT4ForConditionalGeneration:
    return toy.model()


def batch() -> dict[str, Any]:
    return toy.ToyBatches(0, toy.longer(Path("out"), 3).stages[0])[0]


def test_language_loss_is_the_models_own(model: MiniGPT4ForConditionalGeneration) -> None:
    given = batch()
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


def test_gradients_reach_every_trainable_part_and_nothing_else(model: MiniGPT4ForConditionalGeneration) -> None:
    model.zero_grad(set_to_none=True)
    language(model, batch()).loss.backward()

    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = {name.removeprefix("model.").partition(".")[0] for name in reached}
    assert parts == {"query_tokens", "qformer", "language_projection"}
    model.zero_grad(set_to_none=True)
