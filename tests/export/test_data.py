"""Mini-batches drawn from files of arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lola_flwr.errors import UserError
from lola_flwr.export.data import ArrayFiles, chosen


def mix(value):
    """SplitMix64, with Python's whole numbers."""
    rest = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & rest
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & rest
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & rest
    return value ^ value >> 31


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.integers(0, 2**63 - 1),
    st.integers(1, 2**31),
)
def test_the_rule_is_the_one_that_is_stated(examples, size, seed, server_round):
    drawn = chosen(examples, size, seed=seed, server_round=server_round)
    key = mix(mix(seed) ^ server_round)
    ordered = sorted(range(examples), key=lambda i: mix((key + i) % 2**64))
    assert drawn.tolist() == ordered[:size]


def test_splitmix64_is_the_published_one():
    # The first numbers of the reference implementation for the state 1234567.
    state = 1234567
    assert mix(state) == 6457827717110365317
    assert mix((state + 0x9E3779B97F4A7C15) % 2**64) == 3203168211198807973


def test_every_example_comes_as_often_as_the_others():
    rounds = [chosen(20, 5, seed=7, server_round=r) for r in range(1, 2001)]
    counts = np.bincount(np.concatenate(rounds), minlength=20)
    # 500 are expected of each; four standard deviations of a binomial.
    assert np.abs(counts - 500).max() < 4 * np.sqrt(2000 * 0.25 * 0.75)


def test_files_are_mapped_and_refused_where_they_do_not_fit(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(12).reshape(4, 3))
    np.save(tmp_path / "b.npy", np.arange(4))
    source = ArrayFiles.in_directory(tmp_path, ["a", "b"], seed=1)
    batch = source(2, 3)
    np.testing.assert_array_equal(batch["a"][:, 0], 3 * batch["b"])
    assert len(source(1, 9)["b"]) == 4
    np.save(tmp_path / "b.npy", np.arange(5))
    with pytest.raises(UserError, match="different numbers of examples"):
        ArrayFiles.in_directory(tmp_path, ["a", "b"])
    (tmp_path / "b.npy").write_bytes(b"no array")
    for name in ("b", "c"):
        with pytest.raises(UserError, match=rf"{name}\.npy cannot be read"):
            ArrayFiles.in_directory(tmp_path, ["a", name])
    np.save(tmp_path / "b.npy", np.array(3))
    with pytest.raises(UserError, match="holds no examples"):
        ArrayFiles.in_directory(tmp_path, ["b"])
    with pytest.raises(UserError, match="seed=-1 must be from 0"):
        ArrayFiles(arrays={}, seed=-1)
