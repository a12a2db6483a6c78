"""An answer by a search over several at once: the library's own, between whose tokens other answers go on."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from minigpt4.inference.generation import AnswerWriter
from minigpt4.inference.reading import answer_rules, never_said
from minigpt4.inference.request import Request
from minigpt4.model import MiniGPT4ForConditionalGeneration


class _Between(StoppingCriteria):
    """Called after every token of a search: lets others have their turn, and ends it when nobody waits for it."""

    def __init__(self, request: Request, others: Callable[[], None]) -> None:
        self.request = request
        self.others = others

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Say of each row whether it ends: all or none."""
        self.others()
        return torch.full((len(input_ids),), self.request.given_up, device=input_ids.device, dtype=torch.bool)


def search(
    model: MiniGPT4ForConditionalGeneration,
    request: Request,
    writer: AnswerWriter,
    others: Callable[[], None],
    stops: dict[str, Any],
    pictures: dict[str, Any],
) -> bool:
    """Answer a request; its text comes whole, at the end.

    Args:
        model: The model.
        request: What was asked, with `num_beams` of more than 1.
        writer: Writes its text.
        others: Called after every token.
        stops: What ends an answer, for `generate`.
        pictures: Its pictures' embeddings, for `generate`.

    Returns:
        Whether it was answered; False where it was given up.

    Raises:
        WeightsError: The language model's scores are no numbers.
    """
    options = dict(request.options)
    if (seed := options.pop("seed")) is not None:
        torch.manual_seed(seed)
    rules = answer_rules(model, options, len(request.ids))
    options.pop("repetition_penalty", None)
    input_ids = torch.tensor([request.ids], device=model.device)
    output: list[int] = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        suppress_tokens=never_said(model),
        logits_processor=rules,
        stopping_criteria=StoppingCriteriaList([_Between(request, others)]),
        **pictures,
        **options,
        **stops,
    )[0].tolist()
    if request.given_up:
        return False
    answer, said = request.answer, output[len(request.ids) :]
    for token in said:
        if text := writer.write(token):
            request.deliver(text)
    if text := writer.end():
        request.deliver(text)
    answer.text = writer.text
    answer.completion_tokens = len(said)
    ended = writer.ended or bool(said and said[-1] in stops["eos_token_id"])
    answer.finish_reason = "stop" if ended else "length"
    answer.seconds_to_first_token = time.monotonic() - request.asked_at
    return True
