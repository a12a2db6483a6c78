"""Options of generation are checked by name and range."""

from typing import Any

import pytest

from minigpt4.errors import UsageError
from minigpt4.inference.sampling import generation_options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beams": 3}, "there is no generation option beams"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number from 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"num_beams": "3"}, "num_beams is '3'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": False}, "temperature is False"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 1.0}, "top_k is 1.0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1]}, r"seed is \[1\]"),
    ],
)
def test_option_out_of_range_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        generation_options(options)


@pytest.mark.parametrize("name", ["top_p", "nucleus"])
def test_option_is_named_as_the_person_spells_it(name: str) -> None:
    with pytest.raises(UsageError, match=f" {name}$|^{name} is 2"):
        generation_options({name: 2})
    with pytest.raises(UsageError, match=f" <{name}>$|^<{name}> is 2"):
        generation_options({name: 2}, lambda option: f"<{option}>")


def test_a_shortest_answer_above_the_longest_is_refused() -> None:
    with pytest.raises(UsageError, match="--min-length is 50, and an answer has at most 10 tokens") as refused:
        generation_options({"min_length": 50, "max_new_tokens": 10}, lambda name: f"--{name.replace('_', '-')}")
    assert refused.value.hint == "lower it, or raise --max-new-tokens"
