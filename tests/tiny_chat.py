"""A tiny random model with a processor of its own: everything a conversation needs, in a second.

The tokenizer is of GPT-2's kind with ChatML's control tokens. The weights are wide enough that another picture, another
place or another question changes the answer.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.processing import MiniGPT4ImageProcessor, MiniGPT4Processor
from tests.model import tiny
from tests.processing.tiny_tokenizers import IMAGE_TOKEN, byte_level_kind, image_token_id

CONTEXT = 1024
SIZE = tiny.IMAGE_SIZE


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    ours = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_kind().backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
    )
    ours.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", IMAGE_TOKEN]})
    return ours


def model(seed: int = 0, *, vision: str = "blip_2_vision_model") -> MiniGPT4ForConditionalGeneration:
    """A random model; of the control tokens its answers hold at most the one that ends them."""
    words = tokenizer()
    torch.manual_seed(seed)
    config = MiniGPT4Config(
        vision_config={"model_type": vision, **tiny.VISION[vision]},
        qformer_config=dict(tiny.QFORMER),
        text_config={
            **tiny.TEXT["llama"],
            "vocab_size": len(words),
            "max_position_embeddings": CONTEXT,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        },
        num_query_tokens=tiny.NUM_IMAGE_TOKENS,
        image_token_id=image_token_id(words),
        initializer_range=tiny.WIDE,
        trainable_parts=["query_tokens", "qformer", "language_projection"],
    )
    made = tiny.randomized(MiniGPT4ForConditionalGeneration(config), seed).eval()
    made.generation_config.suppress_tokens = [
        words.convert_tokens_to_ids(token) for token in ("<s>", "<|im_start|>", IMAGE_TOKEN)
    ]
    return made


def processor(template: str = "chatml") -> MiniGPT4Processor:
    return MiniGPT4Processor(
        MiniGPT4ImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer(),
        num_image_tokens=tiny.NUM_IMAGE_TOKENS,
        image_token=IMAGE_TOKEN,
        template=template,
    )


def picture(seed: int = 0) -> Image.Image:
    """A picture of noise, another for each seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8))


def saved(folder: Path) -> Path:
    """Write the model and its processor as a full folder."""
    model().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder
