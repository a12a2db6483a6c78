"""`load(language_model=...)` takes another copy of the model that an alignment was trained with, and no other model."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from minigpt4 import load
from minigpt4.errors import ConfigError, WeightsError
from tests import tiny_chat
from tests.weights import tiny_nano
from tests.weights.tiny_nano import language_model, tokenizer


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The language model an alignment is trained with."""
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "home"))
    tiny_nano.stand_in_for_the_parts(monkeypatch)
    return language_model(tmp_path / "original")


@pytest.fixture
def alignment(original: Path, tmp_path: Path) -> Path:
    return tiny_nano.alignment(tmp_path / "alignment", original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_copy_of_the_model_is_recognised(dtype: torch.dtype, alignment: Path, tmp_path: Path) -> None:
    copy = language_model(tmp_path / "copy", dtype=dtype)

    model, processor = load(alignment, language_model=copy, device="cpu")

    table = LlamaForCausalLM.from_pretrained(copy, dtype=torch.float32).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, table.bfloat16().float())
    assert model.model.language_projection.bias.unique().tolist() == [0.5]
    assert processor.image_token_id == model.config.image_token_id
    assert load(alignment, language_model=copy, device="cpu")[0].config.name_or_path == model.config.name_or_path


def test_another_model_of_the_same_size_is_refused(alignment: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"likeness of -?0\.\d+ to this one's, expected 0\.98") as told:
        load(alignment, language_model=language_model(tmp_path / "other", seed=1), device="cpu")

    assert "use the language model it was trained with" in told.value.hint


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"hidden_size": 128}, "whose width is 64, this one's is 128"),
        ({"num_hidden_layers": 2}, "whose layers is 1, this one's is 2"),
    ],
)
def test_a_model_of_another_size_is_refused_with_both_sizes(
    sizes: dict[str, int], complaint: str, alignment: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=complaint):
        load(alignment, language_model=language_model(tmp_path / "other", **sizes), device="cpu")


def test_a_model_without_a_place_for_pictures_is_refused_before_it_is_joined(alignment: Path, tmp_path: Path) -> None:
    other = language_model(tmp_path / "other", words=tokenizer(unused="<other>"))

    with pytest.raises(WeightsError, match=r"whose tokens is [0-9a-f]{64}, this one's is [0-9a-f]{64}"):
        load(alignment, language_model=other, device="cpu")


def test_a_model_of_another_kind_is_refused(alignment: Path, tmp_path: Path) -> None:
    words = tokenizer()
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=len(words)))
    for part in (model, words):
        part.save_pretrained(tmp_path / "gpt2")

    with pytest.raises(WeightsError, match="holds a language model of kind gpt2, expected llama"):
        load(alignment, language_model=tmp_path / "gpt2", device="cpu")


def test_a_folder_that_is_no_model_is_refused_in_one_sentence(alignment: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    before = sorted((tmp_path / "home" / "models").iterdir())

    with pytest.raises(WeightsError, match="empty is not a folder of a language model: ") as told:
        load(alignment, language_model=tmp_path / "empty", device="cpu")

    assert "\n" not in told.value.message
    assert "SmolLM2" in told.value.hint
    assert sorted(path for path in (tmp_path / "home" / "models").iterdir() if path.is_dir()) == [
        path for path in before if path.is_dir()
    ]


def test_a_full_folder_keeps_its_own(tmp_path: Path) -> None:
    full = tiny_chat.saved(tmp_path / "full")

    with pytest.raises(ConfigError, match=f"^{full} is a full model with a language model of its own") as told:
        load(full, language_model=language_model(tmp_path / "copy"), device="cpu")

    assert str(tmp_path / "copy") in told.value.message
    assert "leave the other language model out" in told.value.hint
