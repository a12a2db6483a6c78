"""A stand-in for nano in miniature: a tiny language model as a hub has it, and an alignment trained with it."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minigpt4.model import EfficientNetLiteConfig, EfficientNetLiteModel
from minigpt4.weights import nano
from minigpt4.weights.alignment import save_alignment
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


def stand_in_for_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nano's frozen parts be had without a network; the vision encoder is a random one."""
    random = EfficientNetLiteModel(EfficientNetLiteConfig()).state_dict()
    seen: dict[str, Tensor] = {name: t for name, t in random.items() if not name.startswith("concept_embeddings")}
    monkeypatch.setattr(nano, "fetch", lambda part, progress=None: Path(part.member))
    monkeypatch.setattr(nano, "read_torch_file", lambda path: {})
    monkeypatch.setattr(nano, "convert_vision_weights", lambda tensors: seen)


def alignment(folder: Path, original: Path, *, mark: float = 0.5) -> Path:
    """Write an alignment trained with a language model, with a mark in its projection."""
    model, words = nano.assemble(*nano.frozen_parts(language_model=original))
    with torch.no_grad():
        model.model.language_projection.bias.fill_(mark)
    save_alignment(folder, model, nano.make_processor(model.config, words))
    return folder
