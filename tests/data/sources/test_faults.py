"""Whichever error tells of a bad record, it has a kind to count by."""

import pickle

import pytest

from minigpt4.data.sources.faults import NO_PICTURE, NO_PROMPT, OTHER, UNREADABLE, BadRecordError, kind_of
from minigpt4.errors import ContextOverflowError, DataError, ImageError, MiniGPT4Error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadRecordError(NO_PICTURE, "3 has no picture"), NO_PICTURE),
        (ImageError("the picture is cut short"), UNREADABLE),
        (ContextOverflowError("the conversation is too long"), NO_PROMPT),
        (DataError("3 has an empty answer"), OTHER),
    ],
)
def test_every_error_of_a_record_has_a_kind_also_from_another_process(error: MiniGPT4Error, kind: str) -> None:
    assert kind_of(error) == kind
    assert kind_of(pickle.loads(pickle.dumps(error))) == kind
