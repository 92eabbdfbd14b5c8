"""Norms and storage of arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.arrays import in_one, squared_norm


@given(
    st.sampled_from([0, 1, 255, 256, 257, 70_000]),
    st.sampled_from([1.0, 1e-44, 1e-30, 1e-12, 1e19, 1e37]),
    st.integers(0, 9),
)
def test_a_norm_is_that_of_float64(size, scale, seed):
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(size) * scale).astype(np.float32)
    expected = float(np.square(values, dtype=np.float64).sum())
    assert squared_norm(values) == pytest.approx(expected, rel=1e-6, abs=0)
    if size % 2 == 0:
        assert squared_norm(values.reshape(2, -1)) == squared_norm(values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 300, 999])
def test_it_is_finite_exactly_where_all_elements_are(value, position):
    values = np.full(1000, np.finfo(np.float32).max, np.float32)
    assert math.isfinite(squared_norm(values))
    values[position] = value
    assert not math.isfinite(squared_norm(values))


def test_one_storage_has_copies_and_views():
    own = np.float32([[1, 2], [3, 4]])
    flat, views = in_one({"w": own, "b": np.float32([5])})
    assert [*views] == ["w", "b"]
    assert flat.tolist() == [5, 1, 2, 3, 4]
    views["w"][1, 1] = 9
    assert flat[4] == 9
    assert own[1, 1] == 4
