"""Packed texts are the texts: nothing of them is lost, and each goes on where their prefix ends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.data.examples import IGNORED, TextExample, padded
from minigpt4.data.packing import answer_lengths, pack, packed_mask, packed_positions
from minigpt4.errors import DataError

IMAGE = 9
BEGINNING = [1, 2, IMAGE, IMAGE]


def text(question: list[int], answer: list[int], cut: int = 0) -> TextExample:
    return TextExample(BEGINNING + question + answer, [IGNORED] * (4 + len(question)) + answer, cut)


TEXTS = st.lists(
    st.builds(text, *[st.lists(st.integers(3, 5), min_size=1, max_size=4)] * 2, st.integers(0, 2)),
    min_size=1,
    max_size=5,
)


@given(TEXTS)
def test_each_text_can_be_read_off_again(texts: list[TextExample]) -> None:
    joined = pack(texts, IMAGE)

    beginning, *lengths = joined.segments
    assert beginning + sum(lengths) == len(joined.input_ids) == len(joined.labels)
    at = beginning
    for length, whole in zip(lengths, texts, strict=True):
        assert joined.input_ids[:beginning] + joined.input_ids[at : at + length] == whole.input_ids
        assert joined.labels[:beginning] + joined.labels[at : at + length] == whole.labels
        assert joined.labels[at] == IGNORED, "two texts would learn from one place"
        at += length
    assert joined.cut == sum(whole.cut for whole in texts)


def test_a_common_prefix_is_read_once() -> None:
    joined = pack([text([3, 4, 5], [3]), text([3, 4, 3], [4, 5])], IMAGE)

    assert joined == TextExample([*BEGINNING, 3, 4, 5, 3, 3, 4, 5], [IGNORED] * 7 + [3, IGNORED, 4, 5], 0, (6, 2, 3))


def test_answers_to_the_same_question_share_all_but_its_last_place() -> None:
    joined = pack([text([3, 4], [5]), text([3, 4], [5, 3])], IMAGE)

    assert joined.segments == (5, 2, 3)
    assert joined.labels == [*[IGNORED] * 6, 5, IGNORED, 5, 3]


@pytest.mark.parametrize(
    "other",
    [
        TextExample([1, 3, IMAGE, IMAGE, 4, 5], [*[IGNORED] * 5, 5], 0),  # another beginning
        TextExample([1, 2, IMAGE, IMAGE, 5], [*[IGNORED] * 4, 5], 0),  # nothing before what is learnt
    ],
)
def test_texts_that_do_not_begin_alike_are_refused(other: TextExample) -> None:
    with pytest.raises(DataError, match="do not begin alike"):
        pack([text([3], [4]), other], IMAGE)


def test_learnt_places_are_counted_for_each_text() -> None:
    assert answer_lengths(pack([text([3], [4]), text([5], [4, 4, 4])], IMAGE)) == [1, 3]
    assert answer_lengths(text([3], [4, 4])) == [2]


def test_rows_of_one_text_have_no_segments() -> None:
    assert packed_positions([text([3], [4]), text([3, 4], [4])]) == {}


@given(TEXTS, TEXTS)
def test_each_place_sees_its_own_text_up_to_itself(first: list[TextExample], second: list[TextExample]) -> None:
    rows = [pack(first, IMAGE), pack(second, IMAGE), text([3], [4, 5])]
    made = packed_positions(rows)
    seen = packed_mask(made["segment_ids"])[:, 0]
    input_ids = padded(rows, 0)["input_ids"]

    assert made["segment_ids"].shape == made["position_ids"].shape == input_ids.shape
    for number, texts in enumerate([first, second, [rows[2]]]):
        beginning, *lengths = rows[number].segments or (0, len(rows[number].input_ids))
        at = beginning
        for length, whole in zip(lengths, texts, strict=True):
            for offset in range(length):
                places = seen[number, at + offset].nonzero().flatten()
                assert input_ids[number, places].tolist() == whole.input_ids[: beginning + offset + 1]
                assert made["position_ids"][number, places].tolist() == list(range(beginning + offset + 1))
            at += length
    assert seen.any(-1).all(), "a place that sees nothing has no number for its attention"


def test_padding_is_seen_by_no_text() -> None:
    made = packed_positions([pack([text([3], [4]), text([5], [4])], IMAGE), text([3], [4] * 9)])
    seen = packed_mask(made["segment_ids"])[0, 0]

    assert not seen[:8, 8:].any()
    assert torch.equal(made["segment_ids"][0, 8:].unique(), torch.tensor([3]))
