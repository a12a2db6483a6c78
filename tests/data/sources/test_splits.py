"""What is for testing is told by its name, and what only sounds like it is not."""

import pytest

from minigpt4.data.sources.splits import is_of_another, training_files


@pytest.mark.parametrize("split", ["test", "val", "Validation", " dev ", "val2014", "test_A"])
def test_rows_for_testing_are_told_by_their_split(split: str) -> None:
    assert is_of_another(split)


@pytest.mark.parametrize("split", ["train", "restval", "trainval", "train_val", "", None, 1])
def test_other_rows_are_to_learn_from(split: object) -> None:
    assert not is_of_another(split)


def test_files_for_testing_are_left_out_unless_all_are() -> None:
    assert training_files(["train/0.tar", "val/0.tar", "test-0.tar"]) == ["train/0.tar"]
    assert training_files(["val/0.tar"]) == ["val/0.tar"]
