"""`load(language_model=...)` takes another copy of the model that an alignment was trained with, and no other model."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minigpt4 import load
from minigpt4.errors import WeightsError
from minigpt4.model import EfficientNetLiteConfig, EfficientNetLiteModel
from minigpt4.weights import nano
from minigpt4.weights.folder import save_alignment
from tests.processing.tiny_tokenizers import CHATML_TOKENS, SENTENCES


def tokenizer(*more: str, unused: str = nano.UNUSED_TOKEN) -> PreTrainedTokenizerFast:
    """A tokenizer with SmolLM2's control tokens; 300 tokens, and `more`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(more),
        special_tokens=[unused, *CHATML_TOKENS, *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=CHATML_TOKENS[1], pad_token=CHATML_TOKENS[1])


def language_model(
    folder: Path,
    *,
    seed: int = 0,
    words: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype = torch.float32,
    **sizes: int,
) -> Path:
    """Write a tiny language model as a hub would have it."""
    words = words or tokenizer()
    torch.manual_seed(seed)
    config: dict[str, int] = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        **sizes,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), tie_word_embeddings=True, **config))
    model.to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The language model an alignment is trained with; the vision encoder's file is a stand-in."""
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "home"))
    random = EfficientNetLiteModel(EfficientNetLiteConfig()).state_dict()
    seen: dict[str, Tensor] = {name: t for name, t in random.items() if not name.startswith("concept_embeddings")}
    monkeypatch.setattr(nano, "fetch", lambda part, progress=None: Path(part.member))
    monkeypatch.setattr(nano, "read_torch_file", lambda path: {})
    monkeypatch.setattr(nano, "convert_vision_weights", lambda tensors: seen)
    return language_model(tmp_path / "original")


@pytest.fixture
def alignment(original: Path, tmp_path: Path) -> Path:
    """An alignment trained with `original`, with a mark in its projection."""
    model, words = nano.assemble(*nano.frozen_parts(language_model=original))
    with torch.no_grad():
        model.model.language_projection.bias.fill_(0.5)
    save_alignment(tmp_path / "alignment", model, nano.make_processor(model.config, words))
    return tmp_path / "alignment"


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


def test_a_model_of_other_words_is_refused_with_both_numbers(alignment: Path, tmp_path: Path) -> None:
    other = language_model(tmp_path / "other", words=tokenizer("<more>"))

    with pytest.raises(WeightsError, match="whose vocabulary is 300, this one's is 301"):
        load(alignment, language_model=other, device="cpu")


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


def test_a_folder_that_does_not_exist_is_refused(alignment: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="none is not a folder"):
        load(alignment, language_model=tmp_path / "none", device="cpu")
