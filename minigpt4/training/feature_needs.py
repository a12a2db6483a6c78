"""Which records' pictures a stage reads: what `features: cache` has to look at before it begins.

A bad record is stood in for by another, which has to be looked at, too, and may be bad itself; so they are found in
rounds, until one finds nothing new.
"""

import numpy as np

from minigpt4.data.batches import MAX_ATTEMPTS, SourceBatches


def num_places(batches: SourceBatches) -> int:
    """Return how many places of the order the processes of a stage read: whole windows."""
    windows = -(-batches.length // batches.bucket_batches)
    return windows * batches.bucket_batches * batches.batch_size * batches.process.world_size


class NeededRecords:
    """The records that the places of a stage lead to, bad ones and those in their place included.

    Args:
        batches: Of the stage; of any of its processes.
    """

    UNSEEN, WANTED, GOOD, BAD = range(4)

    def __init__(self, batches: SourceBatches) -> None:
        self._order = batches.order
        self._places = num_places(batches)
        self._states = [np.zeros(size, np.uint8) for size in batches.order.sizes]

    def find(self) -> bool:
        """Find records that are needed and were not looked at; whether there are any."""
        found = False
        for place in range(self._places):
            source, number = self._order.pick(place)
            states = self._states[source]
            for attempt in range(1, MAX_ATTEMPTS):
                if states[number] != self.BAD:
                    break
                number = self._order.replacement(place, attempt)
            if states[number] == self.UNSEEN:
                states[number] = self.WANTED
                found = True
        return found

    def wanted(self) -> np.ndarray:
        """Return `(records, 2)`, source and number of each record found, in the order in which sources hold them."""
        rows = [
            np.stack([np.full(len(numbers), source), numbers], axis=1)
            for source, states in enumerate(self._states)
            for numbers in [np.flatnonzero(states == self.WANTED)]
        ]
        return np.concatenate(rows)

    def note(self, source: int, number: int, *, bad: bool) -> None:
        """Take what a record turned out to be."""
        self._states[source][number] = self.BAD if bad else self.GOOD
