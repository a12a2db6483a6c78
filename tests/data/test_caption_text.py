"""Captions come out as the original's own processor recorded them."""

import pytest

from minigpt4.data.caption_text import blip_caption
from tests import golden


@pytest.mark.reference
def test_captions_are_the_recorded_ones() -> None:
    recorded = golden.content("golden/caption_processor.json")
    for case in recorded["default"]:
        assert blip_caption(case["i"]) == case["o"], case
    for case in recorded["prompt_max5"]:
        assert blip_caption(case["i"], 5, "a photo of ") == case["o"], case
    assert len(recorded["default"]) >= 5


def test_punctuation_becomes_space_and_long_captions_are_cut() -> None:
    assert blip_caption("A  Dog, (big)! runs.\n") == "a dog, big runs"
    assert blip_caption("x " * 60) == " ".join("x" * 50)
