"""Tiny random models of every kind the tests need, and inputs that fit them.

One picture takes `NUM_IMAGE_TOKENS` places of `IMAGE_TOKEN_ID`. Weights are drawn with a seed and are wide enough
(`initializer_range`) that a wrong picture, place or mask moves the logits by far more than rounding does.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration

VOCABULARY = 96
IMAGE_TOKEN_ID = 3
PAD_ID = 0
NUM_IMAGE_TOKENS = 4
IMAGE_SIZE = 16
WIDE = 0.2  # standard deviation of new weights

VISION: dict[str, dict[str, Any]] = {
    "blip_2_vision_model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": IMAGE_SIZE,
        "initializer_range": WIDE,  # the library's own default leaves every weight near zero
    },
    "efficientnet_lite": {
        "stage_repeats": [1, 2],
        "stage_kernels": [3, 5],
        "stage_strides": [1, 2],
        "stage_expansions": [1, 2],
        "stage_channels": [8, 16],
        "stem_channels": 8,
        "head_channels": 32,
        "image_size": IMAGE_SIZE,
        "num_classes": 7,
        "feature_stages": [0, 1],
        "feature_scales": [1.0, 0.5],
        "position_channels": 8,
        "num_concepts": 1,
        "concept_length": 2,
        "concept_size": 32,
    },
    "dinov2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": IMAGE_SIZE,
        "initializer_range": WIDE,
    },
    "clip_vision_model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": IMAGE_SIZE,
    },
    "siglip_vision_model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": IMAGE_SIZE,
    },
}
QFORMER: dict[str, Any] = {
    "model_type": "blip_2_qformer",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "cross_attention_frequency": 2,
    "initializer_range": WIDE,
}
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "initializer_range": WIDE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD_ID,
}
TEXT: dict[str, dict[str, Any]] = {
    "llama": {**_TEXT, "model_type": "llama", "num_key_value_heads": 1},
    "llama, tied": {**_TEXT, "model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2": {**_TEXT, "model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt_neox": {**_TEXT, "model_type": "gpt_neox"},
    # Its embedding table has another name than LLaMA's, and is the head as well.
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": VOCABULARY,
        "initializer_range": WIDE,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PAD_ID,
    },
}
PAIRS = [(vision, "llama") for vision in VISION] + [("blip_2_vision_model", text) for text in TEXT if text != "llama"]
"""Every vision encoder and every language model at least once."""


def config(
    vision: str = "blip_2_vision_model", text: str = "llama", qformer: bool = True, **changes: Any
) -> MiniGPT4Config:
    """Return a configuration of tiny parts; `changes` are fields of `MiniGPT4Config`."""
    return MiniGPT4Config(
        vision_config={"model_type": vision, **VISION[vision]},
        qformer_config=dict(QFORMER) if qformer else None,
        text_config=dict(TEXT[text]),
        num_query_tokens=NUM_IMAGE_TOKENS,
        image_token_id=IMAGE_TOKEN_ID,
        initializer_range=WIDE,
        **changes,
    )


def randomized(model: MiniGPT4ForConditionalGeneration, seed: int = 0) -> MiniGPT4ForConditionalGeneration:
    """Shake every parameter, so that biases and norms, which start as constants, count as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def model(seed: int = 0, **kwargs: Any) -> MiniGPT4ForConditionalGeneration:
    """Return a random model in evaluation mode; the arguments are `config`'s."""
    torch.manual_seed(seed)
    return randomized(MiniGPT4ForConditionalGeneration(config(**kwargs)), seed).eval()


def pictures(number: int, seed: int = 0, size: int = IMAGE_SIZE) -> Tensor:
    """Return `(number, 3, size, size)` of noise, each picture another."""
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def row(num_pictures: int, words: int, seed: int = 0, num_image_tokens: int = NUM_IMAGE_TOKENS) -> list[int]:
    """Return ids of a prompt: each picture between words, `words` more of them at the end."""
    generator = torch.Generator().manual_seed(seed)

    def some(number: int) -> list[int]:
        ids: list[int] = torch.randint(IMAGE_TOKEN_ID + 1, VOCABULARY, (number,), generator=generator).tolist()
        return ids

    ids = [1, *some(2)]
    for _ in range(num_pictures):
        ids += [IMAGE_TOKEN_ID] * num_image_tokens + some(1)
    return ids + some(words)


def batch(rows: list[list[int]]) -> dict[str, Tensor]:
    """Return rows as left-padded `input_ids` and `attention_mask`."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD_ID] * (width - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]),
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are control tokens and single characters: letters, then Chinese ones.

    The library's stop strings need the first letters, and its streamer waits for a space except after Chinese.
    """
    words = ["<pad>", "<s>", "</s>", "<image>", *"abcdef", *(chr(0x4E00 + place) for place in range(VOCABULARY - 10))]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
