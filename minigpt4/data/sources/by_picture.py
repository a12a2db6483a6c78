"""Records about the same picture, read together: the picture is looked at once for several texts.

A list of questions, or of captions, often names a picture several times, and a table may have a list of captions for
it. Here its records become one, with several texts; a model reads them in one row, none of them knowing the others
(`minigpt4.data.packing`). Which belong together is a function of the list: the picture's records in the list's
order, a number of them at a time.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from minigpt4.data.record import Record, Source
from minigpt4.errors import ConfigError


@dataclass(frozen=True)
class ByPicture:
    """A source's records, those about the same picture joined.

    Args:
        source: The list, or the table.
        most: How many of its records make one, at most.
        numbers: All numbers of the source's records, those that belong together next to each other.
        starts: Where the numbers of each record here start; one more, where the last ends.
    """

    source: Source
    most: int
    numbers: np.ndarray
    starts: np.ndarray

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.source.name

    @property
    def identity(self) -> str:
        """A digest of the source, and of how it is joined."""
        return hashlib.sha256(f"{self.source.identity} by picture, {self.most}".encode()).hexdigest()

    @cached_property
    def text_lengths(self) -> Sequence[int]:
        """Bytes of what is said in each record."""
        lengths = np.asarray(self.source.text_lengths, dtype=np.int64)[self.numbers]
        return [int(lengths[start:end].sum()) for start, end in pairwise(self.starts)]

    @property
    def skipped(self) -> dict[str, int]:
        """What the source passes over."""
        return self.source.skipped

    def __len__(self) -> int:
        return len(self.starts) - 1

    def group(self, number: int) -> str:
        """Return what the first of a record's texts came in."""
        return self.source.group(int(self.numbers[self.starts[number]]))

    def barren(self) -> Sequence[str]:
        """Return what the source knows to have no good record."""
        return self.source.barren()

    def known_bad(self) -> list[int]:
        """Return the numbers of the records that are bad without being read; each of these has one text."""
        bad = set(self.source.known_bad())
        return [number for number, start in enumerate(self.starts[:-1]) if int(self.numbers[start]) in bad]

    def together(self) -> None:
        """Return None: they are joined."""

    def read(self, number: int, *, with_picture: bool = True) -> Record:
        """Return a record, whose picture may be left out.

        Raises:
            BadRecordError: One of its texts is bad, or the picture cannot be had.
        """
        first, *others = (
            self.source.read(int(joined), with_picture=with_picture and at == 0)
            for at, joined in enumerate(self.numbers[self.starts[number] : self.starts[number + 1]])
        )
        if not others:
            return first
        return replace(
            first, key=f"{first.key} and {len(others)} more", beside=tuple(record.turns for record in others)
        )


def by_picture(source: Source, most: int) -> ByPicture:
    """Join a source's records about the same picture.

    Args:
        source: The list, or the table.
        most: How many of its records make one, at most.

    Raises:
        ConfigError: No two of its records have the same picture.
    """
    groups = source.together()
    if groups is None:
        raise ConfigError(
            f"{source.name} has one text for each of its pictures, so texts_per_picture changes nothing there",
            hint="leave texts_per_picture out; it is for lists of captions, conversations or questions",
        )
    numbers, starts = array("Q"), array("Q", [0])
    alone = True
    for about_one in groups:
        alone = alone and len(about_one) == 1
        for start in range(0, len(about_one), most):
            numbers.extend(about_one[start : start + most])
            starts.append(len(numbers))
    if alone:
        raise ConfigError(
            f"no picture of {source.name} stands there twice, so texts_per_picture changes nothing there",
            hint="leave texts_per_picture out",
        )
    return ByPicture(source, most, np.array(numbers, dtype=np.int64), np.array(starts, dtype=np.int64))
