from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.errors import UserError
from lola_flwr.server.assembly import (
    BLOCK_MEANS,
    BlockUpdate,
    average_statistics,
    block_mean_named,
)
from lola_flwr.server.norm_limits import NormHistory, NormLimits


def update(value, num_examples=8, name="w"):
    return BlockUpdate({name: np.array(value, np.float32)}, num_examples)


@pytest.mark.parametrize("block_mean", ["median", "trimmed"])
def test_one_of_three_cannot_move_a_robust_mean_beyond_the_others(block_mean):
    honest = [update([1.0, -2.0]), update([3.0, -1.0])]
    for lie in ([1e30, 1e30], [-1e30, 0.0], [2.0, -1.5]):
        mean = block_mean_named(block_mean)([*honest, update(lie, 8000)])["w"]
        assert np.all((mean >= [1.0, -2.0]) & (mean <= [3.0, -1.0]))
    moved = block_mean_named("mean")([*honest, update([1e30, 0])])["w"]
    assert moved[0] > 1e29


@pytest.mark.parametrize("block_mean", ["median", "trimmed"])
def test_nor_the_running_statistics(block_mean):
    def holding(mean, count, num_examples=8):
        values = {"running_mean": np.float32(mean), "num_batches_tracked": count}
        statistics = {name: np.asarray(value) for name, value in values.items()}
        return BlockUpdate({}, num_examples, statistics)

    updates = [
        holding([1.0, -2.0], 10),
        holding([1e6, -1e6], 2**40, 8000),
        holding([3.0, -1.0], 13),
    ]
    robust = average_statistics(updates, block_mean)
    assert np.all(robust["running_mean"] >= [1.0, -2.0])
    assert np.all(robust["running_mean"] <= [3.0, -1.0])
    assert 10 <= robust["num_batches_tracked"] <= 13
    for name, values in updates[0].statistics.items():
        assert robust[name].dtype == values.dtype
        assert robust[name].shape == values.shape
    assert average_statistics(updates)["running_mean"][0] > 9e5


@given(
    st.integers(3, 12),
    st.data(),
    st.sampled_from(["median", "trimmed"]),
)
def test_a_minority_stays_within_the_honest_values(count, data, block_mean):
    numbers = st.floats(-1e3, 1e3, width=32)
    hostile = data.draw(st.integers(0, count // 3))
    honest = [data.draw(numbers) for _ in range(count - hostile)]
    lies = [
        data.draw(st.floats(-(2.0**100), 2.0**100, width=32)) for _ in range(hostile)
    ]
    updates = [update([value]) for value in (*lies, *honest)]
    mean = float(block_mean_named(block_mean)(updates)["w"][0])
    slack = 1e-6 * (1 + np.abs(honest).max())
    assert min(honest) - slack <= mean <= max(honest) + slack


@pytest.mark.parametrize("block_mean", BLOCK_MEANS)
def test_all_means_agree_on_equal_updates_and_keep_names_and_types(block_mean):
    updates = [update([0.5, 1.5]) for _ in range(4)]
    mean = block_mean_named(block_mean)([*updates, update([9.0], name="v")])
    assert list(mean) == ["w", "v"]
    np.testing.assert_array_equal(
        mean["w"], np.array([0.5, 1.5], np.float32), strict=True
    )
    np.testing.assert_array_equal(mean["v"], np.array([9.0], np.float32), strict=True)


def test_unknown_means_are_named():
    with pytest.raises(UserError, match="choose from mean, median, trimmed"):
        block_mean_named("krum")([])


def test_the_usual_norm_is_the_median_of_a_block():
    history = NormHistory()
    for norm in (1.0, 2.0):
        history = history.after([(0, norm)])
        assert history.usual(0) == np.inf
    history = history.after([(0, 100.0)])
    assert history.usual(0) == 2.0
    assert history.usual(1) == np.inf
    # Honest norms that grow for good are the usual ones after a while.
    history = history.after([(0, 50.0)] * 60)
    assert history.usual(0) == 50.0
    assert len(history.of_block[0]) == 20
    assert NormHistory({0: (0.0,) * 9}).usual(0) == np.inf


@given(st.floats(0, 1e30), st.floats(1e-6, 1e6) | st.just(np.inf))
def test_large_updates_are_scaled_down_and_monstrous_ones_refused(norm, usual):
    scale = NormLimits(max_norm=10.0, factor=3.0).scale(norm, usual)
    assert (scale == 0) == (norm > 30 * usual)
    assert norm * scale <= min(3 * usual, 10.0) * (1 + 1e-12)
    if norm <= min(3 * usual, 10.0):
        assert scale == 1
    assert NormLimits(np.inf, np.inf).scale(norm, usual) == 1
