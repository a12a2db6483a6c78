"""Records about the same picture, read together: the picture is looked at once for several texts.

A list of questions, or of captions, often names a picture several times, and a table may have a list of captions for
it. Here its records become one, with as many texts as are wanted; a model reads them side by side, none of them knowing
the others (`minigpt4.data.side_by_side`). Which belong together is a function of the list: the picture's records in the
list's order, so many at a time.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from minigpt4.data.record import Record
from minigpt4.data.sources.listed import ListSource
from minigpt4.data.sources.opening import CheckableSource
from minigpt4.data.sources.parquet import ParquetSource
from minigpt4.errors import ConfigError


@dataclass(frozen=True)
class ByPicture:
    """A list's records, those about the same picture joined.

    Args:
        listed: The list, or the table.
        most: So many records make one, at most.
        numbers: All numbers of the list's records, those that belong together next to each other.
        starts: Where the numbers of each record here start; one more, where the last ends.
    """

    listed: ListSource | ParquetSource
    most: int
    numbers: np.ndarray
    starts: np.ndarray

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.listed.name

    @property
    def identity(self) -> str:
        """A digest of the list, and of how it is joined."""
        return hashlib.sha256(f"{self.listed.identity} by picture, {self.most}".encode()).hexdigest()

    @cached_property
    def text_lengths(self) -> Sequence[int]:
        """Bytes of what is said in each record."""
        lengths = np.asarray(self.listed.text_lengths, dtype=np.int64)[self.numbers]
        return [int(lengths[start:end].sum()) for start, end in pairwise(self.starts)]

    def __len__(self) -> int:
        """How many records there are, bad ones included."""
        return len(self.starts) - 1

    def group(self, number: int) -> str:
        """Return the name of the list."""
        return self.listed.group(number)

    def read(self, number: int) -> Record:
        """Return a record.

        Raises:
            BadRecordError: One of its texts is bad, or the picture cannot be had.
        """
        first, *others = (
            self.listed.read(int(listed), with_picture=at == 0)
            for at, listed in enumerate(self.numbers[self.starts[number] : self.starts[number + 1]])
        )
        if not others:
            return first
        return replace(
            first, key=f"{first.key} and {len(others)} more", beside=tuple(record.turns for record in others)
        )


def by_picture(source: CheckableSource, most: int) -> ByPicture:
    """Join a list's records about the same picture.

    Args:
        source: The list.
        most: So many records make one, at most.

    Raises:
        ConfigError: No two of its records have the same picture, or it is no list and so cannot tell.
    """
    if not isinstance(source, ListSource | ParquetSource) or source.text_lengths is None:
        raise ConfigError(
            f"{source.name} has one text for each of its pictures, so texts_per_picture changes nothing there",
            hint="leave texts_per_picture out; it is for lists of captions, conversations or questions",
        )
    numbers, starts = array("Q"), array("Q", [0])
    alone = True
    for about_one in source.together():
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
