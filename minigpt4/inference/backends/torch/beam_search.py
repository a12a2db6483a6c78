"""Beam search: the library's own, with a pause after every token."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from minigpt4.errors import WeightsError
from minigpt4.model import MiniGPT4ForConditionalGeneration


class _Pause(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return of each row whether it ends: all or none."""
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device, dtype=torch.bool)


class _FiniteScores(LogitsProcessor):
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores as they are, or raise as `Sampler.choose` does."""
        if not bool(scores.max() < torch.inf):  # also where one is NaN
            raise WeightsError(
                "the language model's scores are no numbers",
                hint="its weights are damaged, or need more bits: load it as float32",
            )
        return scores


@torch.inference_mode()
def beam_search(
    model: MiniGPT4ForConditionalGeneration,
    ids: Sequence[int],
    options: dict[str, Any],
    stopped: Callable[[], bool],
) -> list[int]:
    """Return the ids of the best answer.

    Args:
        model: The model.
        ids: The prompt.
        options: For `generate`, with `num_beams` of more than 1, and a `seed` for one that draws.
        stopped: Called after every token; true ends the search.

    Raises:
        WeightsError: The language model's scores are no numbers.
    """
    options = dict(options)
    if (seed := options.pop("seed")) is not None:
        torch.manual_seed(seed)
    # `generate` lets this one take the place of its own, which would count the prompt's ids.
    penalty = float(options.pop("repetition_penalty", model.generation_config.repetition_penalty or 1.0))
    repetition = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=len(ids))
    input_ids = torch.tensor([list(ids)], device=model.device)
    output: list[int] = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        logits_processor=LogitsProcessorList([_FiniteScores(), repetition]),
        stopping_criteria=StoppingCriteriaList([_Pause(stopped)]),
        **options,
    )[0].tolist()
    return output[len(ids) :]
