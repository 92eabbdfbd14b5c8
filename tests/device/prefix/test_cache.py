from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.device.prefix import ActivationCache
from lola_flwr.errors import UserError


@pytest.fixture(params=["memory", "disk"])
def directory(request, tmp_path):
    return tmp_path / "cache" if request.param == "disk" else None


def entry_bytes(tensor, directory):
    """Bytes that one tensor takes in a cache."""
    cache = ActivationCache(10**9, directory and directory.parent / "one")
    cache.put("k", tensor)
    return cache.num_bytes


def test_returns_what_was_put(directory):
    cache = ActivationCache(10**6, directory)
    tensor = torch.arange(12.0).reshape(3, 4)
    assert cache.get("a") is None
    cache.put("a", tensor[:2])
    tensor.zero_()
    torch.testing.assert_close(cache.get("a"), torch.arange(8.0).reshape(2, 4))
    assert (cache.hits, cache.misses) == (1, 1)


def test_the_least_recently_used_gives_way(directory):
    each = entry_bytes(torch.zeros(10), directory)
    cache = ActivationCache(2 * each, directory)
    for key in ("a", "b"):
        cache.put(key, torch.zeros(10))
    cache.get("a")
    cache.put("c", torch.zeros(10))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    assert cache.get("c") is not None
    assert cache.num_bytes == 2 * each


def test_what_is_larger_than_the_cache_is_not_kept(directory):
    cache = ActivationCache(100, directory)
    cache.put("a", torch.zeros(1000))
    assert cache.get("a") is None
    assert cache.num_bytes == 0


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 40)), max_size=30),
    st.integers(1, 300),
)
def test_never_above_its_bound_and_never_another_tensor(puts, max_bytes):
    cache = ActivationCache(max_bytes)
    last = {}
    for key, length in puts:
        last[key] = torch.full((length,), float(length))
        cache.put(key, last[key])
        assert 0 <= cache.num_bytes <= max_bytes
        for known, tensor in last.items():
            kept = cache.get(known)
            assert kept is None or torch.equal(kept, tensor)
    assert cache.num_bytes == sum(
        kept.nbytes for key in "abcd" if (kept := cache.get(key)) is not None
    )


def test_outlives_the_process_on_disk(tmp_path):
    first = ActivationCache(10**6, tmp_path)
    first.put("a", torch.ones(3))
    second = ActivationCache(10**6, tmp_path)
    assert second.num_bytes == first.num_bytes
    torch.testing.assert_close(second.get("a"), torch.ones(3))
    # What another process has added is found, too.
    first.put("b", torch.zeros(2))
    torch.testing.assert_close(second.get("b"), torch.zeros(2))
    assert second.num_bytes == first.num_bytes
    # A smaller cache takes away what no longer fits.
    assert ActivationCache(1, tmp_path).num_bytes == 0
    assert first.get("a") is None


def test_a_damaged_file_is_computed_anew(tmp_path):
    cache = ActivationCache(10**6, tmp_path)
    cache.put("a", torch.ones(3))
    (tmp_path / "a.safetensors").write_bytes(b"damaged")
    assert cache.get("a") is None
    assert cache.num_bytes == 0
    assert not list(tmp_path.iterdir())


def test_a_cache_of_no_bytes():
    with pytest.raises(UserError, match="max_bytes=0"):
        ActivationCache(0)
