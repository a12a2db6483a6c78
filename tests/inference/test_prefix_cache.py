"""The caches keep what was used last, within their bytes."""

import torch

from minigpt4.inference.prefix_cache import ImageCache


def test_least_recently_used_picture_is_forgotten_first() -> None:
    cache = ImageCache(max_bytes=3 * 40)
    for key in "abc":
        cache.put(key, torch.zeros(10))
    assert cache.get("a") is not None  # used again

    cache.put("d", torch.zeros(10))

    assert [key for key in "abcd" if cache.get(key) is not None] == ["a", "c", "d"]


def test_cache_never_holds_more_bytes_than_it_may() -> None:
    cache = ImageCache(max_bytes=100)

    cache.put("a", torch.zeros(20))
    cache.put("b", torch.zeros(20))
    assert (cache.get("a"), cache.get("b") is None) == (None, False)
    cache.put("huge", torch.zeros(1000))

    assert cache.get("huge") is None
