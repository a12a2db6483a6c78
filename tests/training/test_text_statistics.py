"""What is said of a stage's texts before it begins."""

from minigpt4.training.text_statistics import TextStatistics


def test_one_length_is_said_once() -> None:
    assert TextStatistics([2, 2, 2], 0, 160).sentence("own") == "stage own: answers of 2 tokens (3 examples looked at)"
    assert (
        TextStatistics([1, 3], 0, 160).sentence("own").startswith("stage own: answers of 1 to 3 tokens, half of them")
    )
    assert "95 % at most 3 (" in TextStatistics([1, 3], 0, 160).sentence("own")
    assert TextStatistics([], 0, 160).sentence("own") == "stage own: none of its first examples can be used"
