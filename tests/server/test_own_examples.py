from __future__ import annotations

import json

import numpy as np
import pytest

from lola_flwr.build import DeviceOptions, RoundSettings, Transfer
from lola_flwr.errors import UserError
from lola_flwr.run.values import from_values, to_values
from lola_flwr.server.directions import projection
from lola_flwr.server.own_examples import (
    ExampleMean,
    Groups,
    agreements_among,
    pulls_after,
)
from lola_flwr.server.reputation import Reputation
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
    assert agreements_among(same, 8) == []
    assert agreement(np.zeros(8), rng.standard_normal((4, 8))) == 0


def test_what_means_explain_is_taken_out_and_nothing_else(rng):
    examples = rng.standard_normal((20, 30))
    groups = np.arange(20) % 3
    found = Groups.of(examples, groups)
    assert found.sizes.tolist() == [7, 7, 6, 20]
    means = found.means[:-1]
    for n in range(3):
        np.testing.assert_allclose(means[n], examples[n::3].mean(axis=0))
    known = ExampleMean.of(examples)
    rest = rng.standard_normal((4, 30))
    beyond = known.beyond(means, rest)
    for mean in means:
        np.testing.assert_allclose(known.beyond(means, rest - 3 * mean), beyond)
    cosines = known.cosines(np.concatenate([beyond, means]))
    np.testing.assert_allclose(cosines[:4, 4:], 0, atol=1e-9)
    np.testing.assert_allclose(cosines.diagonal(), 1)


def test_cosines_are_those_of_the_definition(rng):
    examples = rng.standard_normal((20, 30)) + 0.2
    known = ExampleMean.of(examples)
    updates = np.stack([known.mean, *rng.standard_normal((3, 30)), np.zeros(30)])
    cosines = known.cosines(updates)
    np.testing.assert_allclose(cosines, cosines.T)
    for update, found in zip(updates[1:4], cosines[0, 1:4], strict=True):
        assert found == pytest.approx(by_matrices(update, examples))
    assert not cosines[-1].any()


@pytest.mark.parametrize("count", [2, 3, 8, 21])
def test_examples_are_compared_with_those_of_the_other_quarters(rng, count):
    examples = rng.standard_normal((count, 30)) + 1
    found = agreements_among(examples, 32)
    # A single other example differs from none.
    assert len(found) == (0 if count == 2 else min(count, 4))
    for quarter, cosine in enumerate(found):
        others = [row for n, row in enumerate(examples) if n % 4 != quarter]
        expected = agreement(examples[quarter::4].mean(axis=0), np.stack(others))
        assert cosine == pytest.approx(expected, abs=1e-12)


def test_as_many_are_compared_with_the_others_as_a_mini_batch_has(rng):
    examples = rng.standard_normal((64, 30)) + 0.3
    found = agreements_among(examples, 2)
    assert len(found) == 4
    for quarter, cosine in enumerate(found):
        # Sixteen are a quarter: one of its first half, one of its second.
        some = [quarter, quarter + 32]
        others = np.delete(examples, some, axis=0)
        expected = agreement(examples[some].mean(axis=0), others)
        assert cosine == pytest.approx(expected, abs=1e-12)
    assert np.mean(found) < np.mean(agreements_among(examples, 16))


SHAPES = {"a": (300, 200), "b": (7,), "c": (), "d": (3, 2, 5), "long": (20_000,)}
PARTS = {0: ("a", "b"), -1: ("c", "d", "long")}


class Examples:
    """Gradients that grow with what is trained; it counts how often each is asked."""

    def __init__(self, rng, count=8):
        self.count = count
        self.groups = np.arange(count) % 2
        self.asked = []
        self.drawn = [
            {n: rng.standard_normal(s).astype("f4") for n, s in SHAPES.items()}
            for _ in range(count)
        ]

    def gradient(self, number, values):
        return {n: g * values["b"][0] for n, g in self.drawn[number].items()}

    def __call__(self, values, chosen, rows):
        self.asked.append([*chosen])
        every = [self.gradient(number, values) for number in chosen]

        def looked_at(gradient, wanted):
            whole = wanted is None or gradient.ndim < 2
            return (gradient if whole else gradient[wanted]).reshape(-1)

        return {
            name: np.stack([looked_at(one[name], wanted) for one in every])
            for name, wanted in rows.items()
        }


def values_of(factor):
    return {n: np.full(shape, factor, np.float32) for n, shape in SHAPES.items()}


def after(known, examples, server_round, factor=1.0, key=7):
    return pulls_after(
        known,
        examples,
        values_of(factor),
        PARTS,
        server_round=server_round,
        key=key,
    )


def test_they_are_the_projections_of_the_gradients_that_devices_would_send(rng):
    examples = Examples(rng)
    pulls = after({}, examples, 1)
    assert pulls.keys() == PARTS.keys()
    for part, names in PARTS.items():
        found = pulls[part].projections
        for number, row in enumerate(found):
            gradient = examples.gradient(number, values_of(1.0))
            expected = projection(gradient, names, 7)
            # But for the rounding to whole numbers.
            assert np.abs(row - expected).max() < 2e-4 * np.linalg.norm(expected)
        other = after({}, examples, 1, key=8)[part].projections
        assert not np.allclose(found, other, rtol=0.1)


def test_nothing_pulls_at_a_head_of_which_nothing_is_trained(rng):
    """As of a language model under adapters."""
    examples, parts = Examples(rng), {0: ("a", "b"), -1: ()}
    pulls = {}
    for server_round in (1, 2):
        pulls = pulls_after(
            pulls, examples, values_of(1.0), parts, server_round=server_round, key=7
        )
        assert pulls.keys() == {0}
    assert [len(numbers) for numbers in examples.asked] == [8, 2]


def test_a_quarter_is_computed_anew_in_each_round_and_the_others_are_kept(rng):
    examples = Examples(rng)
    pulls = after({}, examples, 5)
    (everyone,) = examples.asked
    assert everyone == [*range(8)]
    before = pulls
    for server_round in range(6, 11):
        pulls = after(pulls, examples, server_round, factor=float(server_round))
        chosen = examples.asked[-1]
        assert len(chosen) == 2
        kept = [number for number in everyone if number not in chosen]
        for part in PARTS:
            was, now = before[part].projections, pulls[part].projections
            np.testing.assert_array_equal(now[kept], was[kept])
            apart = np.abs(now[chosen] - was[chosen])
            assert (apart > 0.05 * np.abs(was[chosen])).any(axis=1).all()
        before = pulls
    lately = [number for asked in examples.asked[-4:] for number in asked]
    assert sorted(lately) == everyone
    # With other examples, or parts, nothing that was kept is theirs.
    after(pulls, Examples(rng, 9), 11)
    assert pulls[0].lengths.shape == (8,)
    again = Examples(rng)
    after({0: pulls[0]}, again, 11)
    assert again.asked == [everyone]


@pytest.mark.parametrize("count", [1, 3])
def test_few_examples_are_computed_in_some_rounds_only(rng, count):
    examples = Examples(rng, count)
    pulls = after({}, examples, 1)
    for server_round in range(2, 6):
        pulls = after(pulls, examples, server_round)
    assert [len(asked) for asked in examples.asked] == [count, *[1] * count]


def test_a_checkpoint_has_them_as_they_are(rng):
    examples = Examples(rng)
    known = Reputation(key=7, pulls=after({}, examples, 1))
    text = json.dumps(to_values(known))
    restored = from_values(Reputation, json.loads(text))
    for part, pulls in known.pulls.items():
        again = restored.pulls[part]
        np.testing.assert_array_equal(again.sketches, pulls.sketches)
        np.testing.assert_array_equal(again.lengths, pulls.lengths)
        assert again.sketches.dtype == np.int16
    follows = [after(r.pulls, examples, 2, 3.0) for r in (known, restored)]
    for part in PARTS:
        one, other = (found[part].projections for found in follows)
        np.testing.assert_array_equal(one, other)


def test_what_is_no_number_points_nowhere(rng):
    examples = Examples(rng)
    pulls = after({}, examples, 1, factor=float("nan"))
    for part in PARTS:
        assert not pulls[part].projections.any()
        assert ExampleMean.of(pulls[part].projections) is None


def test_examples_that_nobody_is_judged_by_are_refused():
    def none(values, chosen, rows):
        return {}

    with pytest.raises(UserError, match="reputation=False judges nobody"):
        DeviceOptions(own_examples=none, reputation=False)
    devices = DeviceOptions(own_examples=none)
    with pytest.raises(UserError, match="drop them, or low_rank"):
        RoundSettings(
            devices=devices, transfer=Transfer(low_rank=LowRankProjection(rank=4))
        )
    with pytest.raises(UserError, match=r"own_examples=.* is for devices that send"):
        RoundSettings(devices=devices).check_for_weights()
