"""Options of generation, and the choice of the next id from scores, on numpy arrays."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt4.errors import UsageError, WeightsError
from minigpt4.inference.backends.protocol import ModelInfo

Scores = NDArray[np.float32]

DEFAULT_MAX_NEW_TOKENS = 300
"""As the original's demo."""

_WHOLE_NUMBERS = {
    "max_new_tokens": (1, 100_000),
    "num_beams": (1, 64),
    "top_k": (0, 10**9),
    "min_length": (0, 100_000),
    "seed": (0, 2**63 - 1),
}
_NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "length_penalty": (-100.0, 100.0),
}


def generation_options(options: dict[str, Any], spelled: Callable[[str], str] = str) -> dict[str, Any]:
    """Check generation options and complete them for `generate`.

    Args:
        options: Values by name; None stands for an option that was not given.
        spelled: Writes an option's name as the person knows it, for the error.

    Raises:
        UsageError: An option that does not exist or is out of its range.
    """
    options = {name: _checked(name, value, spelled) for name, value in options.items() if value is not None}
    generation = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "num_beams": 1, "seed": None, **options}
    if (generation.get("min_length") or 0) > generation["max_new_tokens"]:
        raise UsageError(
            f"{spelled('min_length')} is {generation['min_length']}, and an answer has at most "
            f"{generation['max_new_tokens']} tokens",
            hint=f"lower it, or raise {spelled('max_new_tokens')}",
        )
    generation["min_new_tokens"] = generation.pop("min_length", None)
    if generation.pop("temperature", 0) > 0:
        generation |= {"do_sample": True, "temperature": options["temperature"]}
        generation.setdefault("top_k", 0)
    else:
        generation |= {"do_sample": False, "top_p": None, "top_k": None, "min_p": None, "temperature": None}
    return {name: value for name, value in generation.items() if value is not None or name == "seed"}


def _checked(name: str, value: object, spelled: Callable[[str], str]) -> int | float:
    """Return one option's value in the type that `generate` wants."""
    ranges = {**_WHOLE_NUMBERS, **_NUMBERS}
    if name not in ranges:
        known = ", ".join(map(spelled, ranges))
        raise UsageError(f"there is no generation option {spelled(name)}", hint=f"the options are {known}")
    low, high = ranges[name]
    whole = name in _WHOLE_NUMBERS
    fits = isinstance(value, int) or not whole
    if not isinstance(value, int | float) or isinstance(value, bool) or not fits or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise UsageError(
            f"{spelled(name)} is {value!r}, expected {kind} from {low} to {high}", "leave it out for the usual answer"
        )
    return value if whole else float(value)


@dataclass
class Sampler:
    """Choice of the ids of one answer, by transformers' rules in transformers' order.

    A penalty for repetition counts ids of the answer alone, as in the original, whose `generate` never sees the prompt.

    Args:
        options: As `generation_options` returns them.
        info: The model's own settings, which hold where the options have none.
        draw: Draws an id from scores; it has the answer's own random numbers.
        prompt_length: Ids before the answer.
        model_rules: Further rules of the model: `(ids, scores) -> scores`.
    """

    options: dict[str, Any]
    info: ModelInfo
    draw: Callable[[Scores], int]
    prompt_length: int
    model_rules: Callable[[Sequence[int], Scores], Scores] | None = None

    def choose(self, ids: Sequence[int], logits: Scores) -> int:
        """Choose the next id.

        Args:
            ids: The prompt and the answer so far.
            logits: `(vocabulary,)`; they stay as they are.

        Raises:
            WeightsError: They hold NaN or infinity: the likeliest of them would be an id like any other.
        """
        if not float(logits.max()) < math.inf:  # also where one is NaN
            raise WeightsError(
                "the language model's scores are no numbers",
                hint="its weights are damaged, or need more bits: load it as float32",
            )
        scores = self._allowed(ids, np.array(logits, np.float32))
        if not self.options["do_sample"]:
            return int(scores.argmax())
        return self.draw(self._narrowed(scores / np.float32(self.options["temperature"])))

    def _allowed(self, ids: Sequence[int], scores: Scores) -> Scores:
        """Apply what holds with and without drawing."""
        new = list(set(ids[self.prompt_length :]))
        penalty = np.float32(self.options.get("repetition_penalty", self.info.repetition_penalty))
        if new and penalty != 1:
            scores[new] = np.where(scores[new] < 0, scores[new] * penalty, scores[new] / penalty)
        if self.model_rules is not None:
            scores = self.model_rules(ids, scores)
        scores[list(self.info.suppressed_ids)] = -math.inf
        if len(ids) - self.prompt_length < self.options.get("min_new_tokens", self.info.min_new_tokens):
            scores[list(self.info.end_ids)] = -math.inf
        return scores

    def _narrowed(self, scores: Scores) -> Scores:
        """Leave out unlikely ids: by rank, by the sum of probabilities, by the share of the largest."""
        if top_k := self.options.get("top_k"):
            kth = np.partition(scores, -top_k)[-top_k] if top_k < len(scores) else -math.inf
            scores[scores < kth] = -math.inf
        if (top_p := self.options.get("top_p", self.info.top_p)) < 1.0:
            order = np.argsort(scores, kind="stable")
            unlikely = np.cumsum(_softmax(scores[order])) <= 1 - top_p
            scores[order[:-1][unlikely[:-1]]] = -math.inf
        if min_p := self.options.get("min_p", self.info.min_p):
            probabilities = _softmax(scores)
            scores[probabilities < min_p * probabilities.max()] = -math.inf
        return scores


def _softmax(scores: Scores) -> Scores:
    powers = np.exp(scores - scores.max())
    shares: Scores = powers / powers.sum()
    return shares
