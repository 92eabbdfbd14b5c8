"""Each device's rank: what is left of its step, and the best of all choices."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from lola_flwr.allocation import RankProblem, kept_progress, own_ranks


def test_a_step_of_fewer_components_is_a_noisier_one():
    """Alike, half of them have twice the square, and bring its root less."""
    kept = [kept_progress(np.ones(8), rank) for rank in (1, 2, 4, 8)]
    np.testing.assert_allclose(kept, np.sqrt([1 / 8, 1 / 4, 1 / 2, 1]))


def test_components_that_differ_lose_less():
    unlike = np.array([100.0, 1, 1, 1, 1, 1, 1, 1])
    assert kept_progress(unlike, 2) > kept_progress(np.ones(8), 2)
    assert kept_progress(unlike, 8) == 1.0


def problem_of(rng, *, devices, pace, uploads=1.0):
    rungs = int(rng.integers(1, 5))
    part = 2.0 ** -np.arange(rungs)[::-1]
    return RankProblem(
        compute_s=rng.uniform(0, 1, devices),
        full_band_upload_s=uploads
        * rng.lognormal(0, 1, devices)[:, None]
        * (part + 0.02),
        worth=rng.uniform(0.2, 2, (devices, 1)) * part**0.75,
        constant_s=0.1,
        pace=pace,
    )


@pytest.mark.parametrize("seed", range(40))
def test_brute_force_finds_none_better(seed):
    rng = np.random.default_rng(seed)
    devices = int(rng.integers(1, 6))
    problem = problem_of(rng, devices=devices, pace=float(rng.uniform(0.05, 4)))
    rungs = range(problem.worth.shape[1])
    best = max(problem.gain(np.array(c)) for c in product(rungs, repeat=devices))
    assert problem.gain(own_ranks(problem)) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(("pace", "rung"), [(0.0, -1), (1e6, 0)])
def test_time_that_is_worth_nothing_or_everything(pace, rung):
    problem = problem_of(np.random.default_rng(5), devices=4, pace=pace)
    expected = range(problem.worth.shape[1])[rung]
    np.testing.assert_array_equal(own_ranks(problem), np.full(4, expected))


def test_who_sends_nothing_and_computes_nothing_sends_all():
    problem = problem_of(np.random.default_rng(5), devices=2, pace=1.0, uploads=0.0)
    last = problem.worth.shape[1] - 1
    np.testing.assert_array_equal(own_ranks(problem), [last, last])
    free = RankProblem(
        compute_s=np.zeros(2),
        full_band_upload_s=np.zeros((2, 2)),
        worth=np.array([[1.0, 2.0], [1.0, 2.0]]),
        pace=1.0,
    )
    np.testing.assert_array_equal(own_ranks(free), [1, 1])
