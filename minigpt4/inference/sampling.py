"""The next token of one answer: the library's own rules, and random numbers that belong to the answer alone.

An answer drawn with a seed is the same whatever else is answered at the same time.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt4.inference.reading import answer_rules, never_said
from minigpt4.model import MiniGPT4ForConditionalGeneration


@dataclass
class Sampler:
    """Chooses the tokens of one answer.

    Args:
        options: As `generation_options` returns them.
        model: The model that says them.
        prompt_length: Ids before the answer.
        end_ids: Ids that end an answer.
    """

    options: dict[str, Any]
    model: MiniGPT4ForConditionalGeneration
    prompt_length: int
    end_ids: list[int]
    _rules: LogitsProcessorList = field(init=False)
    _random: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        """Build the rules."""
        options, device = self.options, str(self.model.device)
        rules = answer_rules(self.model, options, self.prompt_length)
        rules.append(SuppressTokensLogitsProcessor(never_said(self.model), device=device))
        if least := options.get("min_new_tokens"):
            rules.append(MinNewTokensLengthLogitsProcessor(self.prompt_length, least, self.end_ids, device=device))
        if options["do_sample"]:
            rules.append(TemperatureLogitsWarper(float(options["temperature"])))
            if top_k := options.get("top_k"):
                rules.append(TopKLogitsWarper(top_k))
            if (top_p := options.get("top_p", 1.0)) < 1.0:
                rules.append(TopPLogitsWarper(top_p))
            if min_p := options.get("min_p"):
                rules.append(MinPLogitsWarper(min_p))
        self._rules = rules
        self._random = torch.Generator(self.model.device)
        seed = options.get("seed")
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)

    def choose(self, ids: list[int], logits: Tensor) -> int:
        """Choose the next id.

        Args:
            ids: All so far, the prompt's too.
            logits: `(vocabulary,)`.

        Raises:
            WeightsError: They are no numbers.
        """
        so_far: Any = torch.tensor([ids], device=self.model.device)
        scores = self._rules(so_far, logits.float()[None])[0]
        if not self.options["do_sample"]:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._random))
