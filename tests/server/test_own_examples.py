from __future__ import annotations

import numpy as np
import pytest

from lola_flwr.build import DeviceOptions, RoundSettings, Transfer
from lola_flwr.errors import UserError
from lola_flwr.server.own_examples import (
    ExampleMean,
    agreements_among,
    projected_examples,
)
from lola_flwr.wire.low_rank import LowRankProjection


def agreement(update, examples):
    return ExampleMean.of(examples).agreement(update)


def by_matrices(update, examples):
    """Return the agreement by its definition."""
    mean = examples.mean(axis=0)
    covariance = (examples - mean).T @ (examples - mean)
    ridge = 0.1 * np.trace(covariance) / min(examples.shape)
    squares, ways = np.linalg.eigh(covariance + ridge * np.eye(len(mean)))
    evened = ways @ np.diag(squares**-0.5) @ ways.T
    one, other = evened @ update, evened @ mean
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.mark.parametrize("shape", [(3, 8), (8, 8), (20, 8)])
def test_it_is_the_cosine_without_the_variation_of_examples(rng, shape):
    examples = rng.standard_normal(shape) * rng.uniform(0.1, 3, shape[1]) + 0.3
    for update in rng.standard_normal((5, shape[1])):
        found = agreement(update, examples)
        assert found == pytest.approx(by_matrices(update, examples), abs=1e-9)
        assert agreement(-7 * update, examples) == pytest.approx(-found, abs=1e-12)


def test_devices_of_one_class_agree_and_those_that_turn_gradients_round_do_not(rng):
    # What the classes pull at is opposite, and the most of all gradients.
    signal, pull = rng.standard_normal((2, 64))
    classes = 5 * np.outer([1, -1], pull)
    noise = 2 * rng.standard_normal((40, 64))
    examples = noise + signal + classes[np.arange(40) % 2]
    devices = [
        (signal + classes[side] + rng.standard_normal((30, 64)), side)
        for side in (0, 1)
    ]
    for updates, _ in devices:
        assert np.mean([agreement(one, examples) for one in updates]) > 0.1
        assert np.mean([agreement(-one, examples) for one in updates]) < -0.1
    # By the whole gradients devices of one class work against the others.
    across = np.mean(devices[0][0] @ devices[1][0].T)
    assert across < 0


def test_nothing_is_told_by_examples_that_do_not_differ(rng):
    same = np.tile(rng.standard_normal(8), (4, 1))
    assert ExampleMean.of(same) is None
    assert ExampleMean.of(same[:1]) is None
    assert agreements_among(same) == []
    assert agreement(np.zeros(8), rng.standard_normal((4, 8))) == 0


@pytest.mark.parametrize("count", [2, 3, 8, 21])
def test_examples_are_compared_with_those_of_the_other_quarters(rng, count):
    examples = rng.standard_normal((count, 30)) + 1
    found = agreements_among(examples)
    # A single other example differs from none.
    assert len(found) == (0 if count == 2 else min(count, 4))
    for quarter, cosine in enumerate(found):
        others = [row for n, row in enumerate(examples) if n % 4 != quarter]
        expected = agreement(examples[quarter::4].mean(axis=0), np.stack(others))
        assert cosine == pytest.approx(expected, abs=1e-12)


def test_projections_of_sums_are_sums_of_projections(rng):
    shapes = {"a": (300, 200), "b": (7,), "c": (), "d": (3, 2, 5)}
    gradients = [
        {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        for _ in range(3)
    ]
    total = {n: np.asarray(sum(g[n] for g in gradients)) for n in shapes}
    parts = {0: ("a", "b"), -1: ("c", "d")}
    one = projected_examples(gradients, parts, 7)
    of_sum = projected_examples([total], parts, 7)
    assert {part: rows.shape[0] for part, rows in one.items()} == {0: 3, -1: 3}
    for part in parts:
        assert one[part].sum(axis=0) == pytest.approx(of_sum[part][0], abs=1e-3)
        assert np.any(one[part][0])
    assert not np.allclose(one[0], projected_examples(gradients, parts, 8)[0])


def test_examples_that_nobody_is_judged_by_are_refused():
    def none(values):
        return []

    with pytest.raises(UserError, match="reputation=False judges nobody"):
        DeviceOptions(own_examples=none, reputation=False)
    devices = DeviceOptions(own_examples=none)
    with pytest.raises(UserError, match="drop them, or low_rank"):
        RoundSettings(
            devices=devices, transfer=Transfer(low_rank=LowRankProjection(rank=4))
        )
    with pytest.raises(UserError, match=r"own_examples=.* is for devices that send"):
        RoundSettings(devices=devices).check_for_weights()
