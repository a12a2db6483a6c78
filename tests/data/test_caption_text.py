"""Captions come out as the original's own processor recorded them."""

import json
from pathlib import Path

import pytest

from minigpt4.data.caption_text import blip_caption

GOLDEN = sorted(
    (Path(__file__).resolve().parents[2].parent / "shared" / "reference").glob("*/golden/caption_processor.json")
)


@pytest.mark.reference
@pytest.mark.skipif(not GOLDEN, reason="the recorded outputs of the original code are not beside the project")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.parents[1].name)
def test_captions_are_the_recorded_ones(path: Path) -> None:
    recorded = json.loads(path.read_text(encoding="utf-8"))
    for case in recorded["default"]:
        assert blip_caption(case["i"]) == case["o"], case
    for case in recorded["prompt_max5"]:
        assert blip_caption(case["i"], 5, "a photo of ") == case["o"], case
    assert len(recorded["default"]) >= 5


def test_punctuation_becomes_space_and_long_captions_are_cut() -> None:
    assert blip_caption("A  Dog, (big)! runs.\n") == "a dog, big runs"
    assert blip_caption("x " * 60) == " ".join("x" * 50)
