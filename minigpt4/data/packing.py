"""Packing: several texts about one picture in one row, which read their common prefix once.

    prefix, picture | first text | second text | ...

Each text (a segment) sees the prefix and itself, and its positions go on where the prefix ends, so loss and gradient
are those of separate rows. With eight questions a picture, a row is about a third as long as eight rows are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt4.data.examples import IGNORED, TextExample
from minigpt4.errors import DataError


def pack(examples: Sequence[TextExample], image_token_id: int) -> TextExample:
    """Join examples that have the same picture; `segments` of the result are the lengths of prefix and texts.

    Raises:
        DataError: They differ before the end of the picture, or nothing is left between it and what is learnt.
    """
    shared = _prefix_length(examples)
    if any(image_token_id in example.input_ids[shared:] for example in examples):
        raise DataError("the texts of a picture do not begin alike up to its end", "leave texts_per_picture out")
    return TextExample(
        [*examples[0].input_ids[:shared], *(i for example in examples for i in example.input_ids[shared:])],
        [IGNORED] * shared + [label for example in examples for label in example.labels[shared:]],
        sum(example.cut for example in examples),
        (shared, *(len(example.input_ids) - shared for example in examples)),
        sum(example.turns_left_out for example in examples),
    )


def _prefix_length(examples: Sequence[TextExample]) -> int:
    """Return how many positions the examples share.

    A position predicts one token, so the first position of each text is not learnt: it belongs to the question.
    """
    shared = 0
    for ids, labels in zip(  # up to the end of the shortest text, whose last position is not shared
        zip(*(example.input_ids for example in examples), strict=False),
        zip(*(example.labels[1:] for example in examples), strict=False),
        strict=False,
    ):
        if len(set(ids)) > 1 or any(label != IGNORED for label in labels):
            break
        shared += 1
    return shared


def answer_lengths(example: TextExample) -> list[int]:
    """Return the number of learnt positions in each text of an example."""
    prefix, *texts = example.segments or (0, len(example.labels))
    lengths, at = [], prefix
    for length in texts:
        lengths.append(sum(label != IGNORED for label in example.labels[at : at + length]))
        at += length
    return lengths


def packed_positions(examples: Sequence[TextExample]) -> dict[str, Tensor]:
    """Return segments and positions of a batch's rows; nothing where no row is packed.

    Returns:
        `segment_ids` and `position_ids`, each `(batch, longest)`: segment 0 is the prefix, or all of a row of one
        text; the texts are 1, 2, ...; padding is a segment of its own.
    """
    if not any(example.segments for example in examples):
        return {}
    longest = max(len(example.input_ids) for example in examples)
    segment_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    position_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        prefix, *texts = example.segments or (len(example.input_ids),)
        position_ids[row, :prefix] = torch.arange(prefix)
        at = prefix
        for number, length in enumerate(texts, 1):
            segment_ids[row, at : at + length] = number
            position_ids[row, at : at + length] = torch.arange(prefix, prefix + length)
            at += length
        segment_ids[row, at:] = len(texts) + 1
    return {"segment_ids": segment_ids, "position_ids": position_ids}


def packed_mask(segment_ids: Tensor) -> Tensor:
    """Return the causal attention mask in which a segment sees the prefix and itself.

    Args:
        segment_ids: `(batch, length)`, see `packed_positions`.

    Returns:
        `(batch, 1, length, length)`, true where the position of the row sees that of the column.
    """
    own = segment_ids[:, :, None] == segment_ids[:, None, :]
    return ((segment_ids[:, None, :] == 0) | own).tril()[:, None]
