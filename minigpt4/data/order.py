"""The order of the examples: a function of seed and place, with no state that a stop could lose.

Places count the examples of a stage, over all steps and processes: place `p` of a stage always holds the same example,
whoever asks for it, however many workers read ahead, and whether the run was interrupted or not. With another number of
processes the same examples come in the same updates for as long as `processes x batch_size x accumulation` is the same.

Knows numbers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

BLOCK = 1000
"""Every block of so many units (examples or batches) holds each source its exact share."""


@dataclass(frozen=True)
class Order:
    """Which example stands where.

    Args:
        sizes: Number of records in each source.
        shares: Part of each source, relative to the others.
        seed: Of everything drawn.
        stage: Number of the stage, which draws its own order.
        unit: So many neighbouring places come from one source: 1, or the size of a whole batch.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    seed: int
    stage: int
    unit: int = 1

    def pick(self, place: int) -> tuple[int, int]:
        """Return source and record number of a place.

        A source is gone through in an order of its own, every record once, then in another order.
        """
        unit, offset = divmod(place, self.unit)
        block, at = divmod(unit, BLOCK)
        sources, earlier = self._block(block)
        source = int(sources[at])
        units_before = block * self._quotas[source] + int(earlier[at])
        epoch, number = divmod(units_before * self.unit + offset, self.sizes[source])
        return source, shuffled(number, self.sizes[source], (self.seed, self.stage, source, epoch))

    def replacement(self, place: int, attempt: int) -> int:
        """Return the number of the record that stands in for a bad one of the same source."""
        source, _ = self.pick(place)
        drawn = np.random.default_rng([self.seed, self.stage, place, attempt, 7])
        return int(drawn.integers(self.sizes[source]))

    @cached_property
    def _quotas(self) -> list[int]:
        """Units of each source in a block: the shares, rounded so that they add up; nobody is left out."""
        total = sum(self.shares)
        exact = [share / total * BLOCK for share in self.shares]
        quotas = [max(1, int(value)) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: int(exact[i]) - exact[i])
        for i in range(BLOCK - sum(quotas)):
            quotas[by_remainder[i % len(quotas)]] += 1
        while sum(quotas) > BLOCK:
            quotas[quotas.index(max(quotas))] -= 1
        return quotas

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        return _drawn_block(tuple(self._quotas), self.seed, self.stage, block)


@lru_cache(maxsize=64)
def _drawn_block(quotas: tuple[int, ...], seed: int, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each unit of a block, and how many units of that source stand before it there."""
    sources = np.repeat(np.arange(len(quotas)), quotas)
    sources = np.random.default_rng([seed, stage, block, 5]).permutation(sources)
    earlier = np.zeros(BLOCK, dtype=np.int64)
    for source in range(len(quotas)):
        of_source = sources == source
        earlier[of_source] = np.arange(int(of_source.sum()))
    return sources, earlier


def shuffled(number: int, size: int, key: tuple[int, ...]) -> int:
    """Return where a permutation of `range(size)` sends a number.

    No list of the size is made, so a hundred million records cost nothing: four rounds of a Feistel network permute
    the next power of four, and numbers beyond `size` are sent on until they fall within (cycle walking; Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    rounds = _round_keys(key)
    while True:
        left, right = number >> half_bits, number & mask
        for round_key in rounds:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        number = (left << half_bits) | right
        if number < size:
            return number


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(value) for value in np.random.SeedSequence(key).generate_state(4, np.uint64))


def _mixed(value: int) -> int:
    """Scramble 64 bits (the finalizer of SplitMix64)."""
    value &= 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def bucketed(lengths: Sequence[int], batch: int, key: tuple[int, ...]) -> list[list[int]]:
    """Deal a window of examples into batches of like length.

    Args:
        lengths: Length of each example of the window; a multiple of `batch` of them.
        batch: Examples in a batch.
        key: Of the order in which the batches come.

    Returns:
        Batches of positions in the window; each position is in one.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    batches = [by_length[start : start + batch] for start in range(0, len(by_length), batch)]
    return [batches[i] for i in np.random.default_rng([*key, 3]).permutation(len(batches))]
