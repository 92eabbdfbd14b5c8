from __future__ import annotations

import math

import numpy as np
import pytest

from lola_flwr.server import expected_lengths
from lola_flwr.server.own_examples import Groups

GROUPS = np.repeat([0, 1], 32)


def expected(update, examples, groups, batch_size):
    of_part = {part: Groups.of(rows, groups) for part, rows in examples.items()}
    return expected_lengths.expected(update, of_part, batch_size)


def leaning(rng, parts=(0, -1)):
    """Return examples of a class the model knows, and of one that it does not."""
    noise = rng.standard_normal((64, 20))
    pulls = np.outer(np.repeat([0.1, -10.0], 32), np.ones(20))
    return dict.fromkeys(parts, noise + pulls)


def batch(examples, group, size, rng):
    chosen = rng.choice(np.flatnonzero(group == GROUPS), size)
    return {part: rows[chosen].mean(axis=0) for part, rows in examples.items()}


def test_a_mini_batch_of_either_class_is_as_that_class_is(rng):
    examples = leaning(rng)
    for group in (0, 1):
        found = [
            expected(batch(examples, group, 8, rng), examples, GROUPS, 8)
            for _ in range(40)
        ]
        assert np.mean([one.apart**2 for one in found]) == pytest.approx(1, abs=0.2)
        assert max(one.apart for one in found) < 2
        # However much longer one of the two is than the other.
        times = np.mean([one.times_longest for one in found])
        assert times == pytest.approx((0.03, 1.0)[group], abs=0.05)


def test_what_is_turned_round_or_stretched_is_far_from_all(rng):
    examples = leaning(rng)
    update = batch(examples, 1, 8, rng)
    for factor in (-1.0, 3.0, 30.0):
        changed = {part: factor * values for part, values in update.items()}
        assert expected(changed, examples, GROUPS, 8).apart > 5


@pytest.mark.parametrize("size", [1, 4, 16])
def test_by_definition(rng, size):
    examples = {0: rng.standard_normal((6, 5)), 1: rng.standard_normal((6, 3))}
    groups = np.array([0, 0, 0, 1, 1, 1])
    update = {0: rng.standard_normal(5), 1: rng.standard_normal(3)}
    whole = np.concatenate([examples[0], examples[1]], axis=1)
    sent = np.concatenate([update[0], update[1]])
    apart, lengths = [], []
    for some in (whole[:3], whole[3:], whole):
        variance = np.square(some - some.mean(axis=0)).sum(axis=1).mean() / size
        apart.append(np.square(sent - some.mean(axis=0)).sum() / variance)
        lengths.append(np.square(some.mean(axis=0)).sum() + variance)
    found = expected(update, examples, groups, size)
    assert found.apart == pytest.approx(math.sqrt(min(apart)))
    times = math.sqrt(sent @ sent / max(lengths))
    assert found.times_longest == pytest.approx(times)


def test_what_tells_nothing_is_none(rng):
    examples = leaning(rng)
    zero = dict.fromkeys(examples, np.zeros(20))
    assert expected(zero, examples, GROUPS, 8) is None
    nothing = dict.fromkeys(examples, np.zeros((64, 20)))
    update = batch(examples, 0, 8, rng)
    assert expected(update, nothing, GROUPS, 8) is None
    same = {part: np.ones((64, 20)) for part in examples}
    assert expected(update, same, GROUPS, 8).apart == math.inf
