"""Which records' pictures a stage reads: what `features: cache` has to look at before it begins.

A bad record is stood in for by another, which has to be looked at, too, and may be bad itself; so they are found in
rounds, until one finds nothing new. The first goes through all places of the stage; the others only through those whose
record is bad.
"""

from collections.abc import Iterator

import numpy as np

from minigpt4.data.batches import MAX_ATTEMPTS, SourceBatches
from minigpt4.weights.folder import Report

TOLD_EVERY = 10_000
"""Places after which whoever waits is told: as many as take about a tenth of a second."""


def num_places(batches: SourceBatches) -> int:
    """Return how many places of the order the processes of a stage read: whole windows."""
    windows = -(-batches.length // batches.bucket_batches)
    return windows * batches.bucket_batches * batches.batch_size * batches.process.world_size


class NeededRecords:
    """The records that the places of a stage lead to, bad ones and those in their place included.

    Takes 8 bytes a place and one a record.

    Args:
        batches: Of the stage; of any of its processes.
    """

    UNSEEN, WANTED, GOOD, BAD = range(4)

    def __init__(self, batches: SourceBatches) -> None:
        self._order = batches.order
        # A record is known by its number among those of all sources.
        self._firsts = np.cumsum([0, *batches.order.sizes])
        self._states = np.zeros(self._firsts[-1], np.uint8)
        self._records = np.empty(num_places(batches), np.int64)
        self._is_first_round = True

    def find(self, what: str = "", report: Report | None = None) -> Iterator[None]:
        """Find records that are needed and were not looked at; `wanted` has them afterwards.

        Args:
            what: A person calls it so.
            report: Told of the places gone through, where there are many.

        Yields:
            Now and then.
        """
        places = range(len(self._records)) if self._is_first_round else self._places_of_bad()
        look = self._pick if self._is_first_round else self._stand_in
        for done, place in enumerate(places, 1):
            look(int(place))
            if done % TOLD_EVERY == 0 or (done == len(places) and done > TOLD_EVERY):
                if report is not None:
                    report(what, done, len(places))
                yield
        self._is_first_round = False

    def _pick(self, place: int) -> None:
        source, number = self._order.pick(place)
        record = self._firsts[source] + number
        self._records[place] = record
        self._states[record] = self.WANTED

    def _places_of_bad(self) -> np.ndarray:
        return np.flatnonzero(self._states[self._records] == self.BAD)

    def _stand_in(self, place: int) -> None:
        record = self._records[place]
        first = self._firsts[np.searchsorted(self._firsts, record, side="right") - 1]
        for attempt in range(1, MAX_ATTEMPTS):
            record = first + self._order.replacement(place, attempt)
            if self._states[record] != self.BAD:
                break
        if self._states[record] == self.UNSEEN:
            self._states[record] = self.WANTED

    def wanted(self) -> np.ndarray:
        """Return `(records, 2)`, source and number of each record found, in the order in which sources hold them."""
        records = np.flatnonzero(self._states == self.WANTED)
        sources = np.searchsorted(self._firsts, records, side="right") - 1
        return np.stack([sources, records - self._firsts[sources]], axis=1)

    def note(self, source: int, number: int, *, bad: bool) -> None:
        """Take what a record turned out to be."""
        self._states[self._firsts[source] + number] = self.BAD if bad else self.GOOD
