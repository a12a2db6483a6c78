"""How an answer is generated and written: the options and their ranges, and ids to text as they come."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from minigpt4.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


class AnswerWriter:
    """Ids to text as they come: no character cut in half, no stop string, nothing before the first word.

    Args:
        tokenizer: Turns ids into text.
        stop_strings: The first of these to appear ends the answer; neither it nor its beginning is ever handed out.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_strings: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.ids: list[int] = []
        self.text = ""
        self.ended = False

    def write(self, token: int) -> str:
        """Take an id, return the text that is now certain."""
        self.ids.append(token)
        return self._new(final=False)

    def end(self) -> str:
        """Return what was held back."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        if self.ended:
            return ""
        # Of one list of ids it makes one string.
        text = cast(
            str, self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ).lstrip()
        for stop in self.stop_strings:
            if stop in text:
                text, self.ended, final = text.partition(stop)[0], True, True
        if not final:
            text = text.rstrip("\ufffd")
            starts = (stop[:n] for stop in self.stop_strings for n in range(len(stop) - 1, 0, -1))
            text = text.removesuffix(next((start for start in starts if text.endswith(start)), ""))
        # A later byte can make earlier ones undecodable and so change text that is out; what follows it is still new.
        new = text.rstrip()[len(self.text) :]
        self.text += new
        return new
