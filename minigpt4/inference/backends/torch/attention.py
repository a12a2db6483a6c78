"""Where a model looked: the Q-Former's cross-attention over the last picture of a conversation, as a grid.

For a question alone it is the mean over queries, heads and layers: what was read, which no question changes, as the
Q-Former sees none. For an answer, or some words of one, each weight counts as much as it made that text likelier:
weight times gradient of the text's log-likelihood, where positive. Averaged alone, attention goes to the corners as
much as to the thing; with the gradient it goes where the answer came from.

Source: Chefer, Gur, Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers" (arXiv 2103.15679), equation 5, the relevance of cross-attention. Known difference: the layers are
averaged, not multiplied through self-attention. This file knows no HTTP.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minigpt4.errors import PromptError, UsageError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing import MiniGPT4Processor

MAX_TOKENS = 1024
"""Longest conversation up to the text that is asked about: all of it is kept in memory for the gradient."""

SATURATED = 0.98
"""The share of places below full strength. One place often has twenty times the mean; the rest would be invisible."""


@dataclass(frozen=True)
class AttentionMap:
    """A grid over the whole picture, row by row from its upper left corner.

    Args:
        values: Rows of numbers from 0 to 1.
        of: What it belongs to: the picture alone, or an answer about it.
        text: The answer's words it belongs to; empty for a picture.
    """

    values: list[list[float]]
    of: str
    text: str = ""


class AttentionMaps:
    """Computes maps beside whoever else uses the model: it shares the weights and nothing else.

    Args:
        model: A model with a Q-Former.
        processor: Its processor.

    Raises:
        UsageError: The model has no Q-Former.
    """

    def __init__(self, model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor) -> None:
        check_can_look(model)
        self.model = _eager_twin(model)
        self.processor = processor

    def look(self, messages: Sequence[dict[str, Any]], span: tuple[int, int] | None = None) -> AttentionMap:
        """Return the map of the last picture.

        Args:
            messages: As for `Engine.submit`; the last one may be the assistant's, whose answer is then meant.
            span: First character and the one after the last of that answer; None for all of it.

        Raises:
            PromptError: There is no picture or no such text, or the conversation is too long.
            UsageError: The encoder's tokens are no square grid.
        """
        pictures = [
            part["image"]
            for message in messages
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image"
        ]
        if not pictures:
            raise PromptError("the conversation has no picture to look at", hint="send one with a question")
        if messages[-1]["role"] != "assistant":
            if span is not None:
                raise PromptError("there is no answer to take words of", hint="let the last message be the assistant's")
            return AttentionMap(_grid(self._of_picture(pictures[-1])), "picture")
        ids, chosen, text = self._answer(messages, span)
        return AttentionMap(_grid(self._of_answer(pictures, ids, chosen)), "answer", text)

    @torch.no_grad()
    def _of_picture(self, picture: Any) -> Tensor:  # noqa: ANN401  (Pillow's)
        weights = self._features(self._see([picture])).cross_attentions
        return torch.stack([layer[0].float().mean((0, 1)) for layer in weights]).mean(0)

    def _of_answer(self, pictures: list[Any], ids: list[int], chosen: list[int]) -> Tensor:
        """Weigh what was read by how much likelier it made the ids at the chosen places: `(tokens,)`."""
        with torch.no_grad():
            seen = self._see(pictures)
        seen.last_hidden_state.requires_grad_()  # the Q-Former may be frozen as a whole
        with torch.enable_grad():
            features = self._features(seen)
            logits = self.model(
                input_ids=torch.tensor([ids[:-1]], device=self.model.device),
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features.pooler_output)},
                logits_to_keep=torch.tensor([place - 1 for place in chosen], device=self.model.device),
            ).logits[0]
            said = torch.tensor([ids[place] for place in chosen], device=logits.device)
            likelihood = logits.float().log_softmax(-1).gather(1, said[:, None]).sum()
            gradients = torch.autograd.grad(likelihood, features.cross_attentions)
        relevance = [
            (gradient[-1].float() * layer[-1].detach().float()).clamp(min=0).mean((0, 1))
            for gradient, layer in zip(gradients, features.cross_attentions, strict=True)
        ]
        return torch.stack(relevance).mean(0)

    def _see(self, pictures: list[Any]) -> Any:  # noqa: ANN401  (any vision model's output)
        pixels = self.processor.image_processor(pictures, return_tensors="pt").pixel_values
        return self.model.model.vision_model(pixels.to(self.model.device, self.model.dtype), return_dict=True)

    def _features(self, seen: Any) -> Any:  # noqa: ANN401  (any vision model's output, MiniGPT4ImageFeatures)
        return self.model.model.align_image_features(seen, output_attentions=True)

    def _answer(
        self, messages: Sequence[dict[str, Any]], span: tuple[int, int] | None
    ) -> tuple[list[int], list[int], str]:
        """Encode a conversation up to the chosen words: its ids, their places, their text."""
        config, tokenizer = self.model.config, self.processor.tokenizer
        encoded = self.processor.prompt_template.encode(
            tokenizer,
            messages,
            image_token_id=config.image_token_id,
            num_image_tokens=config.num_image_tokens,
            add_generation_prompt=False,
            return_assistant_mask=True,
        )
        ids, mask = list(encoded.input_ids), encoded.assistant_mask or []
        end = max((place for place, answer in enumerate(mask) if answer), default=-1) + 1
        start = end
        while start > 0 and mask[start - 1]:
            start -= 1
        # No further than may be looked at, and one more to tell: the time of it grows with the square.
        ends, text = text_ends(tokenizer, ids[start : min(end, MAX_TOKENS + 1)])
        first, last = span or (0, len(text))
        begins = [0, *ends[:-1]]
        chosen = [
            start + number
            for number, (begin, stop) in enumerate(zip(begins, ends, strict=True))
            if first < last and begin < min(last, stop) and stop > first
        ]
        if not chosen and end <= MAX_TOKENS + 1:
            raise PromptError(
                f"the answer has {len(text)} characters, and none from {first} to {last}",
                hint="choose words that it has",
            )
        if not chosen or chosen[-1] + 1 > MAX_TOKENS:
            raise PromptError(
                f"the conversation has more than {MAX_TOKENS} tokens up to there, "
                f"expected at most {MAX_TOKENS} for a map",
                hint="send its last turns only",
            )
        covered = text[begins[chosen[0] - start] : ends[chosen[-1] - start]].strip()
        return ids[: chosen[-1] + 1], chosen, covered


def check_can_look(model: MiniGPT4ForConditionalGeneration) -> None:
    """Refuse a model without a Q-Former.

    Raises:
        UsageError: It has none.
    """
    if model.config.qformer_config is None:
        raise UsageError(
            "this model has no Q-Former, so there is no cross-attention to show",
            hint="nano and MiniGPT-4 with Vicuna have one",
        )


def text_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[int], str]:
    """Say where in their text each of some ids ends; works for every tokenizer, unlike offsets.

    Returns:
        For each id the number of characters that are certain with it, and the whole text.
    """
    texts = [
        str(tokenizer.decode(ids[: n + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)).lstrip()
        for n in range(len(ids))
    ]
    return [len(text.rstrip("\ufffd")) for text in texts], texts[-1] if texts else ""


def _eager_twin(model: MiniGPT4ForConditionalGeneration) -> MiniGPT4ForConditionalGeneration:
    """Copy a model's modules and settings, but no tensor, and let the Q-Former of the copy tell its weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.model.qformer.set_attn_implementation("eager")
    return twin


def _grid(weights: Tensor) -> list[list[float]]:
    """Lay the weights of the tokens out as the places of the picture they come from, and bring them to 0 to 1."""
    side = math.isqrt(len(weights))
    prefix = len(weights) - side * side
    if prefix > 8:  # class and register tokens come before the places
        raise UsageError(
            f"the vision encoder has {len(weights)} tokens, which are no square grid",
            hint="maps are drawn for square pictures only",
        )
    places = weights[prefix:].cpu()
    low, high = places.min(), places.quantile(SATURATED)
    scaled = ((places - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return [[round(value, 4) for value in row] for row in scaled.reshape(side, side).tolist()]
