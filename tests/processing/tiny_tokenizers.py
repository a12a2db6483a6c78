"""Two real tokenizers of a few hundred entries: one of LLaMA's kind, one of GPT-2's kind.

Both know the control tokens of every prompt template, and have merges that reach across the places where templates
and messages meet.
"""

import tempfile
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]
SENTENCES = [
    "###Human: <Img></Img> what is this? ###Assistant: a red circle on a blue field. ###",
    "## # #### a#b C# [INST] what color is it? [/INST] it is yellow. <<SYS>> </s> <s> <|im_end|>",
    "user\nwhat is this\nassistant\nthe circle is red.\n\nsystem\nbe brief.",
]


def sentencepiece_model(**other: Any) -> bytes:
    """The content of a `tokenizer.model` with LLaMA's settings, or with others."""
    model = BytesIO()
    llamas = {
        "model_type": "bpe",
        "vocab_size": 380,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_by_unicode_script": False,
        "allow_whitespace_only_pieces": True,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, **(llamas | other)
    )
    return model.getvalue()


@cache
def llama_kind() -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(sentencepiece_model())
        tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHATML_TOKENS, IMAGE_TOKEN]})
    return tokenizer


@cache
def byte_level_kind() -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", *CHATML_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*CHATML_TOKENS, IMAGE_TOKEN]})
    return tokenizer


KINDS = {"llama": llama_kind, "byte-level": byte_level_kind}


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], *, from_start: bool) -> str:
    """The text of ids, byte for byte; `from_start` drops SentencePiece's dummy space."""
    if from_start:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    lead = tokenizer.encode("a", add_special_tokens=False)
    return tokenizer.decode(lead + ids, clean_up_tokenization_spaces=False)[1:]
