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


def assemble_gradient(updates, block_mean="mean"):
    return block_mean_named(block_mean)(updates)


def test_weighted_by_examples_per_parameter():
    updates = [
        BlockUpdate({"a": np.float32([1, 2]), "head": np.float32([4])}, 10),
        BlockUpdate({"b": np.float32([3]), "head": np.float32([1])}, 30),
        BlockUpdate({"b": np.float32([7]), "head": np.float32([0])}, 10),
    ]
    gradient = block_mean_named("mean")(updates)
    assert sorted(gradient) == ["a", "b", "head"]
    np.testing.assert_allclose(gradient["a"], [1, 2])
    np.testing.assert_allclose(gradient["b"], [(3 * 30 + 7 * 10) / 40])
    np.testing.assert_allclose(gradient["head"], [(4 * 10 + 1 * 30) / 50])
    assert all(values.dtype == np.float32 for values in gradient.values())


def test_inputs_are_not_written_to():
    values = np.float32([1, 2])
    values.setflags(write=False)
    updates = [BlockUpdate({"a": values}, 1), BlockUpdate({"a": values}, 3)]
    np.testing.assert_allclose(block_mean_named("mean")(updates)["a"], [1, 2])


def test_nothing_received():
    assert assemble_gradient([]) == {}


def update(value, num_examples=8, name="w"):
    return BlockUpdate({name: np.array(value, np.float32)}, num_examples)


@pytest.mark.parametrize("block_mean", ["median", "trimmed"])
def test_one_of_three_cannot_move_a_robust_mean_beyond_the_others(block_mean):
    honest = [update([1.0, -2.0]), update([3.0, -1.0])]
    for lie in ([1e30, 1e30], [-1e30, 0.0], [2.0, -1.5]):
        mean = assemble_gradient([*honest, update(lie, 8000)], block_mean)["w"]
        assert np.all((mean >= [1.0, -2.0]) & (mean <= [3.0, -1.0]))
    moved = assemble_gradient([*honest, update([1e30, 0])], "mean")["w"]
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
    mean = float(assemble_gradient(updates, block_mean)["w"][0])
    slack = 1e-6 * (1 + np.abs(honest).max())
    assert min(honest) - slack <= mean <= max(honest) + slack


@pytest.mark.parametrize("block_mean", BLOCK_MEANS)
def test_all_means_agree_on_equal_updates_and_keep_names_and_types(block_mean):
    updates = [update([0.5, 1.5]) for _ in range(4)]
    mean = assemble_gradient([*updates, update([9.0], name="v")], block_mean)
    assert list(mean) == ["w", "v"]
    np.testing.assert_array_equal(
        mean["w"], np.array([0.5, 1.5], np.float32), strict=True
    )
    np.testing.assert_array_equal(mean["v"], np.array([9.0], np.float32), strict=True)


def test_unknown_means_are_named():
    with pytest.raises(UserError, match="choose from mean, median, trimmed"):
        assemble_gradient([], "krum")


@pytest.mark.parametrize(
    ("block_mean", "count", "expected"),
    [
        # A third of 5 is one at either end, of 6 two.
        ("trimmed", 5, [(2 + 3 + 7) / 3, (-6 - 3 - 2) / 3]),
        ("trimmed", 6, [(3 + 7) / 2, (-4 - 3) / 2]),
        ("median", 5, [3, -3]),
        ("median", 6, [5, -3.5]),
    ],
)
def test_robust_means_are_those_of_each_coordinate(block_mean, count, expected):
    values = [[7, -2], [1, -9], [2, -6], [30, 50], [3, -3], [50, -4]]
    updates = [update(value) for value in values[:count]]
    # Of another parameter alone: it has no part in this one's mean.
    mean = assemble_gradient([*updates, update([1e9], name="v")], block_mean)
    np.testing.assert_allclose(mean["w"], expected, rtol=1e-6)
    assert mean["w"].dtype == np.float32


def test_a_scaled_update_is_the_same_but_for_its_gradients():
    statistics = {"running_mean": np.float32([1.0])}
    given = BlockUpdate(
        {"a": np.float32([1, -2]), "b": np.float32([4])}, 7, statistics, 5.0, True
    )
    scaled = given.scaled(np.float64(0.3))
    for name, gradient in given.gradients.items():
        expected = (gradient * np.float64(0.3)).astype(np.float32)
        np.testing.assert_array_equal(scaled.gradients[name], expected, strict=True)
    assert (scaled.num_examples, scaled.norm, scaled.zeroth_order) == (7, 5.0, True)
    assert scaled.statistics is statistics


def test_statistics_are_weighted_by_examples_and_counters_stay_whole():
    def holding(num_examples, **statistics):
        arrays = {name: np.asarray(value) for name, value in statistics.items()}
        return BlockUpdate({}, num_examples, arrays)

    mean = average_statistics(
        [
            holding(10, mean=np.float32([1.0, 2.0]), batches=10),
            holding(30, mean=np.float32([3.0, -2.0]), batches=13),
            holding(50, batches=20, alone=np.float64(0.1)),
        ]
    )
    np.testing.assert_array_equal(mean["alone"], np.array(0.1), strict=True)
    expected = np.float32([2.5, -1.0])
    np.testing.assert_array_equal(mean["mean"], expected, strict=True)
    # (10 * 10 + 30 * 13 + 50 * 20) / 90 = 16.6
    np.testing.assert_array_equal(mean["batches"], np.array(17), strict=True)
    assert average_statistics([]) == {}
