"""One training example as its source has it: an encoded picture and what is said about it.

Here is what every source of examples offers; where they come from (`minigpt4.data.sources`) and what a model makes of
them (`minigpt4.data.examples`) is not known here.
"""

from collections.abc import Iterable, Sequence
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

    @property
    def skipped(self) -> dict[str, int]:
        """How much was passed over, by kind."""

    def __len__(self) -> int:
        """How many records there are, bad ones included."""

    def group(self, number: int) -> str:
        """Return what a record came in, such as its shard: a group without one good record stops a run."""

    def barren(self) -> Sequence[str]:
        """Return the groups that are known, without reading, to have no good record."""

    def known_bad(self) -> Sequence[int]:
        """Return the numbers of the records that are known, without reading, to be bad."""

    def together(self) -> Iterable[Sequence[int]] | None:
        """Yield the numbers of the records of each picture, each bad one alone; None: no picture has two texts."""

    def read(self, number: int, *, with_picture: bool = True) -> Record:
        """Return a record, whose picture may be left out.

        Raises:
            DataError: It is bad: no picture, no text, text of another kind than expected. The picture is not opened.
        """
