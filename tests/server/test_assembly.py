from __future__ import annotations

import numpy as np

from lola_flwr.server.assembly import BlockUpdate, block_mean_named


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
    assert block_mean_named("mean")([]) == {}
