"""The model without a Q-Former, compared with what the original recorded of MiniGPT-v2.

The importer refuses that version's checkpoints; the model's classes, the templates and the name map know it, so these
are compared: answers word for word, texts with ids equal, logits within 1e-4 (up to about 10), the loss within 1e-5.
Its training layout, `multi_select` and the gradients of its adapter have no counterpart here.
"""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from minigpt4.processing.messages import Message
from minigpt4.processing.prompts import template
from minigpt4.weights.original.names import Kind, to_ours, why_ignored
from tests import golden
from tests.model.test_against_original import (
    CLEAR,
    IMAGE,
    IMAGE_TOKEN_ID,
    llama,
    picture_values,
    second_version,
)

pytestmark = pytest.mark.reference
TEMPLATES = {"chat_greedy_llama2_template": "llama-2", "chat_greedy_vicuna0_template": "vicuna-v0-spaced"}
PENALTY = 1.05  # what this version's chat took by itself


def names(path: str, start: str) -> list[str]:
    return [name for name in golden.content(path) if name.startswith(start)]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`:UserWarning")
@pytest.mark.parametrize("name", names("v2/golden/generation.json", "chat_"))
def test_chats_answer_as_the_original_word_for_word(name: str) -> None:
    model, tokenizer, prompt = second_version(), llama("v2/weights/llama2-chat"), template(
        TEMPLATES.get(name, "minigpt-v2")
    )  # fmt: skip
    chat = golden.content("v2/golden/generation.json")[name]
    messages: list[Message] = []
    for number, turn in enumerate(chat["turns"]):
        pictures = [IMAGE] if number == 0 else []
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn["user"]}]})
        ids = prompt.encode(tokenizer, messages, image_token_id=IMAGE_TOKEN_ID, num_image_tokens=4).input_ids
        messages.append({"role": "assistant", "content": turn["text"]})
        answer = model.generate(
            # As embeddings: the original's repetition penalty does not count the words of the prompt.
            inputs_embeds=model.get_input_embeddings()(torch.tensor([ids])),
            pixel_values=picture_values()[[chat["image"]]],
            do_sample=False,
            **{"repetition_penalty": PENALTY, **chat["answer_kwargs"]},
        )[0].tolist()
        assert (turn["min_top2_gap"] or 1.0) > CLEAR
        assert answer == turn["raw_sequence"][1:], number
        assert str(tokenizer.decode(answer, skip_special_tokens=True)).strip() == turn["text"]


def said(row: list[int]) -> list[int]:
    """An answer up to its end; what fills the rest of a row is the library's own choice."""
    return row[: row.index(2) + 1] if 2 in row else row


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`:UserWarning")
@pytest.mark.parametrize("name", names("v2/golden/generation.json", "generate_"))
def test_left_padded_batches_are_answered_word_for_word(name: str) -> None:
    model, case = second_version(), golden.content("v2/golden/generation.json")[name]
    recorded = golden.tensors("v2/golden/generation.safetensors")
    options: dict[str, Any] = dict(case["kwargs"])
    if least := options.pop("min_length", None):
        options["min_new_tokens"] = least - 1  # the original counted the start token
    answers = model.generate(
        inputs_embeds=recorded[f"{name}/inputs_embeds"],
        attention_mask=recorded[f"{name}/attention_mask"],
        do_sample=False,
        **options,
    )
    assert [said(row) for row in answers.tolist()] == [said(row[1:]) for row in case["sequences"]]  # 1: the start token


@torch.no_grad()
@pytest.mark.parametrize("name", list(golden.content("v2/golden/train_forward.json")["cases"]))
def test_logits_and_loss_of_training_batches_are_the_originals(name: str) -> None:
    model, case = second_version(), golden.content("v2/golden/train_forward.json")["cases"][name]
    recorded = golden.tensors(f"v2/golden/train_forward_{name}.safetensors")
    mask, labels = recorded["attention_mask"], recorded["targets"]
    logits = model(inputs_embeds=recorded["inputs_embeds"], attention_mask=mask).logits
    read = mask.bool()
    torch.testing.assert_close(logits[read], recorded["logits"][read], rtol=0.0, atol=1e-4)
    shifted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    each = cross_entropy(*shifted, reduction="none").view(len(labels), -1).mean(1)  # over all places, as there
    losses = each.tolist() if case["reduction"] == "none" else [float(cross_entropy(*shifted))]
    assert losses == pytest.approx(case["loss"], abs=1e-5)


@torch.no_grad()
def test_pictures_in_a_training_batch_are_the_models_own_embeddings() -> None:
    recorded = golden.tensors("v2/golden/train_forward_single.safetensors")["inputs_embeds"][0]
    places = second_version().model.get_image_features(picture_values()[:1]).pooler_output[0]
    starts = [at for at in range(len(recorded) - 3) if torch.allclose(recorded[at : at + 4], places, atol=2e-5)]
    assert len(starts) == 1


def test_every_name_of_its_state_dict_has_a_place() -> None:
    """As the library for adapters called them then, and with the cast that its preparation put round the head."""
    lacking = []
    for name in golden.content("v2/golden/state_dict_keys.json"):
        bare = name.replace("lm_head.0.", "lm_head.")
        kind = Kind.CHECKPOINT if name.startswith("visual_encoder.") else Kind.MINIGPT_V2
        if to_ours(kind, bare) is None and not why_ignored(kind, bare):
            lacking.append(name)
    assert lacking == []


def test_templates_are_written_as_its_conversations() -> None:
    recorded = golden.content("v2/golden/generation.json")["templates"]
    assert recorded.keys() == {"minigptv2", "llama2", "vicuna0"}
    assert template("minigpt-v2").system == recorded["minigptv2"]["system"]
    assert template("llama-2").system == recorded["llama2"]["system"]
    assert template("vicuna-v0-spaced").system == recorded["vicuna0"]["system"]


def test_text_gets_its_slow_tokenizers_ids_with_a_beginning() -> None:
    tokenizer = llama("v2/weights/llama2-chat")
    assert all(
        case["ids_special"] == [tokenizer.bos_token_id, *case["ids_no_special"]]
        for case in golden.content("v2/golden/tokenizer.json")["encode"]
    )
