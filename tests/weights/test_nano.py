"""nano's parts are all used, and joined so that the encoder's words reach the language model from the start."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minigpt4.model import EfficientNetLiteConfig, EfficientNetLiteModel, MiniGPT4ForConditionalGeneration
from minigpt4.model.vision_efficientnet_lite import EfficientNetLiteOutput
from minigpt4.weights import nano
from minigpt4.weights.files.atomic import verify_folder
from minigpt4.weights.files.torch_files import read_torch_file
from minigpt4.weights.parts import EFFICIENTNET_LITE0, fetch


@pytest.fixture(scope="module")
def parts() -> tuple[Any, dict[str, Tensor]]:
    return nano.frozen_parts()


@pytest.fixture(scope="module")
def assembled(parts: tuple[Any, dict[str, Tensor]]) -> tuple[MiniGPT4ForConditionalGeneration, Any]:
    return nano.assemble(*parts)


@pytest.mark.network
def test_every_tensor_of_the_encoder_has_a_place(parts: tuple[Any, dict[str, Tensor]]) -> None:
    original = read_torch_file(fetch(EFFICIENTNET_LITE0))
    read: set[str] = set()

    class Watched(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read.add(name)
            return super().__getitem__(name)

    converted = nano.convert_vision_weights(Watched(original))

    assert {name for name in original if not name.endswith("num_batches_tracked")} == read
    expected = {name: tensor.shape for name, tensor in EfficientNetLiteModel(
        EfficientNetLiteConfig()).state_dict().items() if not name.startswith("concept_embeddings")}  # fmt: skip
    assert {name: tensor.shape for name, tensor in converted.items()} == expected


@pytest.mark.network
def test_what_learns_is_the_joining_parts(assembled: tuple[MiniGPT4ForConditionalGeneration, Any]) -> None:
    model, _ = assembled

    learning = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}

    assert sum(learning.values()) == pytest.approx(9.52e6, rel=1e-3)
    parts = {name.removeprefix("model.").partition(".")[0] for name in learning}
    assert parts == {"query_tokens", "qformer", "language_projection"}
    assert not model.training


@pytest.mark.network
def test_a_word_of_the_encoder_reaches_the_language_model_unchanged(
    assembled: tuple[MiniGPT4ForConditionalGeneration, Any],
) -> None:
    model, tokenizer = assembled
    vision = model.model.vision_model
    table = model.get_input_embeddings().weight
    mean = table.mean(dim=0)
    for number in (0, 281, 999):
        logits = torch.full((1, 1000), -100.0)
        logits[0, number] = 100.0  # certain
        outputs = EfficientNetLiteOutput(
            last_hidden_state=torch.zeros(1, 196, vision.config.hidden_size), concept_embeds=vision.concepts(logits)
        )
        with torch.no_grad():
            said = model.model.align_image_features(outputs).pooler_output[0]
        pieces = tokenizer(" " + nano.class_words()[number], add_special_tokens=False).input_ids[:4]
        likeness = torch.cosine_similarity(said[: len(pieces)] - mean, table[pieces] - mean)
        assert likeness.min() > 0.9


@pytest.mark.network
def test_image_token_replaces_one_that_no_text_uses(assembled: tuple[MiniGPT4ForConditionalGeneration, Any]) -> None:
    model, tokenizer = assembled

    assert tokenizer.convert_ids_to_tokens(model.config.image_token_id) == nano.IMAGE_TOKEN
    assert nano.UNUSED_TOKEN not in tokenizer.get_vocab()
    assert tokenizer.added_tokens_decoder[model.config.image_token_id].special


def test_class_words_fit_the_classifier() -> None:
    assert len(nano.class_words()) == 1000
    assert all(word.strip() == word != "" for word in nano.class_words())


def test_alignment_in_the_package_is_whole() -> None:
    verify_folder(nano.ALIGNMENT_DIR)
