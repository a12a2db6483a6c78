"""Several texts about one picture in one row: what they have in common is read once, and none of them sees another.

    beginning, picture | first text | second text | ...

Each text goes on where the beginning ends, by its positions and by what it may look at, so that loss and gradient are
those of separate rows (`branch_mask` says who sees whom). With eight questions a picture, a row is about a third as
long as eight rows are.

Knows ids and numbers; neither tokenizers nor the model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt4.data.examples import IGNORED, TextExample
from minigpt4.errors import DataError


def side_by_side(examples: Sequence[TextExample], image_token_id: int) -> TextExample:
    """Join the texts of a picture.

    Args:
        examples: Whole examples, each with the same picture in it.
        image_token_id: The id at the picture's places.

    Returns:
        One example; its `branches` are the length of the beginning and those of the texts after it.

    Raises:
        DataError: They do not begin alike up to the end of their picture, with a place more before what is learnt.
    """
    shared = _shared(examples)
    if any(image_token_id in example.input_ids[shared:] for example in examples):
        raise DataError("the texts of a picture do not begin alike up to its end", "leave texts_per_picture out")
    return TextExample(
        [*examples[0].input_ids[:shared], *(i for example in examples for i in example.input_ids[shared:])],
        [IGNORED] * shared + [label for example in examples for label in example.labels[shared:]],
        sum(example.cut for example in examples),
        (shared, *(len(example.input_ids) - shared for example in examples)),
        sum(example.turns_left_out for example in examples),
    )


def _shared(examples: Sequence[TextExample]) -> int:
    """Return how many places the examples have in common.

    What a place predicts is one thing, so the first place of each text is not learnt: it belongs to the question.
    """
    shared = 0
    for ids, labels in zip(  # up to the end of the shortest text, whose last place is not shared
        zip(*(example.input_ids for example in examples), strict=False),
        zip(*(example.labels[1:] for example in examples), strict=False),
        strict=False,
    ):
        if len(set(ids)) > 1 or any(label != IGNORED for label in labels):
            break
        shared += 1
    return shared


def answers_of(example: TextExample) -> list[int]:
    """Return how many places are learnt in each text of an example."""
    beginning, *texts = example.branches or (0, len(example.labels))
    lengths, at = [], beginning
    for length in texts:
        lengths.append(sum(label != IGNORED for label in example.labels[at : at + length]))
        at += length
    return lengths


def branches_of(examples: Sequence[TextExample]) -> dict[str, Tensor]:
    """Number the branches of a batch's rows, and their positions; nothing where no row has any.

    Returns:
        `branch_ids` and `position_ids`, each `(batch, longest)`: 0 in the beginning (and in all of a row of one text),
        then 1, 2, ... in the texts; padding is a branch of its own.
    """
    if not any(example.branches for example in examples):
        return {}
    longest = max(len(example.input_ids) for example in examples)
    branch_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    position_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        beginning, *texts = example.branches or (len(example.input_ids),)
        position_ids[row, :beginning] = torch.arange(beginning)
        at = beginning
        for number, length in enumerate(texts, 1):
            branch_ids[row, at : at + length] = number
            position_ids[row, at : at + length] = torch.arange(beginning, beginning + length)
            at += length
        branch_ids[row, at:] = len(texts) + 1
    return {"branch_ids": branch_ids, "position_ids": position_ids}


def branch_mask(branch_ids: Tensor) -> Tensor:
    """Say which place sees which: those before it in the beginning and in its own text, and itself.

    Args:
        branch_ids: `(batch, length)`, see `branches_of`.

    Returns:
        `(batch, 1, length, length)`, true where the place of the row sees that of the column.
    """
    own = branch_ids[:, :, None] == branch_ids[:, None, :]
    return ((branch_ids[:, None, :] == 0) | own).tril()[:, None]
