"""One training example as its source has it: an encoded picture and what is said about it.

What every source of examples offers stands here; where they come from (`minigpt4.data.sources`) and what a model makes
of them (`minigpt4.data.examples`) does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Record:
    """A picture and a conversation about it.

    Args:
        key: Names the record for people, such as `00003.tar:000030017` or `image/12.jpg`.
        picture: The encoded picture (JPEG, PNG, WebP), not yet opened; None for text alone.
        turns: Questions and answers in turn. The question of a caption is empty: the recipe's prompts ask.
        beside: Further conversations about the same picture, each to be read without the others.
    """

    key: str
    picture: bytes | None
    turns: Turns
    beside: tuple[Turns, ...] = ()


class Source(Protocol):
    """Records by number; the same number gives the same record for as long as `identity` stays the same."""

    @property
    def name(self) -> str:
        """What a person calls it: a path or a hub id."""

    @property
    def identity(self) -> str:
        """A digest of what is in it (names, sizes, places), so that a resumed run notices another source."""

    @property
    def text_lengths(self) -> Sequence[int] | None:
        """Length of each record's text in bytes where the index knows it, for batches of like length; else None."""

    def __len__(self) -> int:
        """How many records there are, bad ones included."""

    def group(self, number: int) -> str:
        """Return what a record came in, such as its shard: a group without one good record stops a run."""

    def read(self, number: int) -> Record:
        """Return a record.

        Raises:
            DataError: It is bad: no picture, no text, text of another kind than expected. The picture is not opened.
        """
