"""What is said of a stage's texts before it begins."""

from pathlib import Path
from typing import Literal

import pytest

from minigpt4.data.batches import SourceBatches
from minigpt4.data.examples import Layout
from minigpt4.data.order import Order
from minigpt4.data.sources import open_source
from minigpt4.training.text_statistics import TextStatistics, text_statistics
from tests import tiny_chat
from tests.data.sources.source_files import write


def test_one_length_is_said_once() -> None:
    assert TextStatistics([2, 2, 2], 0, 160).sentence("own") == "stage own: answers of 2 tokens (3 examples looked at)"
    assert (
        TextStatistics([1, 3], 0, 160).sentence("own").startswith("stage own: answers of 1 to 3 tokens, half of them")
    )
    assert "95 % at most 3 (" in TextStatistics([1, 3], 0, 160).sentence("own")
    assert TextStatistics([], 0, 160).sentence("own") == "stage own: none of its first examples can be used"


@pytest.mark.parametrize(("kind", "words"), [("template", "2 questions"), ("original", "1 question")])
def test_turns_that_are_left_out_are_no_lost_ends(
    kind: Literal["template", "original"], words: str, tmp_path: Path
) -> None:
    turns = [{"from": who, "value": "a dog"} for who in ("human", "gpt")]
    talk = [{"conversations": turns * number} for number in (1, 2, 3, 3)]
    source = open_source(write(tmp_path / "talk.json", talk))
    layout = Layout(tiny_chat.processor(), kind=kind, max_turns=2)
    batches = SourceBatches([source], Order((4,), (1.0,), 0, 0), layout, ["Describe."], length=4, batch_size=1)

    statistics = text_statistics(batches)

    share = "50%" if kind == "template" else "75%"
    assert statistics.cut == 0
    assert statistics.sentence("own").endswith(f"; WARNING: {share} lose what follows their first {words}")
