"""The order is a function: every record once an epoch, sources in their shares, nothing kept between two questions."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.data.order import BLOCK, Order, bucketed, shuffled


@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_shuffling_is_a_permutation(size: int, key: tuple[int, int]) -> None:
    assert sorted(shuffled(number, size, key) for number in range(size)) == list(range(size))


def test_another_key_is_another_order() -> None:
    orders = {tuple(shuffled(number, 50, (key,)) for number in range(50)) for key in range(20)}
    assert len(orders) == 20


def test_a_hundred_million_records_need_no_list() -> None:
    numbers = [shuffled(number, 100_000_000, (1,)) for number in range(1000)]
    assert len(set(numbers)) == 1000
    assert 40_000_000 < sum(numbers) / 1000 < 60_000_000  # spread over all of them


def test_every_record_comes_once_before_any_comes_twice() -> None:
    order = Order(sizes=(7,), shares=(1.0,), seed=3, stage=0)
    epochs = [[order.pick(7 * epoch + place)[1] for place in range(7)] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_sources_have_their_shares_in_every_block() -> None:
    order = Order(sizes=(10, 10, 10), shares=(115, 14, 0.001), seed=1, stage=0)
    for block in range(3):
        picked = Counter(order.pick(place)[0] for place in range(block * BLOCK, (block + 1) * BLOCK))
        assert picked == {0: 891, 1: 108, 2: 1}  # 891.5 and 108.5 of 1,000; the smallest is not forgotten


@pytest.mark.parametrize("seeds", [(1, 0, 2, 0), (1, 0, 1, 1)])
def test_another_seed_or_stage_is_another_order(seeds: tuple[int, int, int, int]) -> None:
    one, other = (Order((1000,), (1.0,), seed, stage) for seed, stage in (seeds[:2], seeds[2:]))
    assert [one.pick(place) for place in range(100)] != [other.pick(place) for place in range(100)]


def test_whole_batches_come_from_one_source() -> None:
    order = Order(sizes=(50, 50), shares=(1, 1), seed=1, stage=0, unit=8)
    sources = [{order.pick(batch * 8 + row)[0] for row in range(8)} for batch in range(100)]
    assert all(len(source) == 1 for source in sources)
    assert {0, 1} == set().union(*sources)
    records = [order.pick(place) for place in range(800) if order.pick(place)[0] == 0][:50]
    assert len(set(records)) == 50  # and still every record once


def test_a_replacement_is_of_the_same_source_and_always_the_same() -> None:
    order = Order(sizes=(5, 1000), shares=(1, 1), seed=1, stage=0)
    for place in range(50):
        source, _ = order.pick(place)
        first = order.replacement(place, 1)
        assert first == order.replacement(place, 1) < order.sizes[source]
    assert len({order.replacement(9, attempt) for attempt in range(20)}) > 2


def test_buckets_hold_like_lengths_and_every_example_once() -> None:
    lengths = [(7 * i) % 32 for i in range(32)]
    batches = bucketed(lengths, 4, (1, 2))
    assert sorted(i for batch in batches for i in batch) == list(range(32))
    assert all(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) == 3 for batch in batches)
    assert bucketed(lengths, 4, (1, 2)) == batches != bucketed(lengths, 4, (1, 3))
