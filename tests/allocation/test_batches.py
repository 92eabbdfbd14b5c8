"""Batches: brute force agrees, bounds hold, and the grid's best is exact."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lola_flwr.allocation.batches import (
    BatchProblem,
    Tried,
    best_candidate,
    own_batches,
)
from tests.marks import rest_slow

_INSTANCES = 300
_AT_ONCE = 15


def small_problem(rng: np.random.Generator, devices: int = 3) -> BatchProblem:
    """Draw an instance whose batches can all be tried; some parts of it are 0."""
    least = rng.integers(1, 3, devices)
    return BatchProblem(
        fixed_s=rng.uniform(0, 1, devices) * rng.integers(0, 2, devices),
        example_s=10 ** rng.uniform(-2, 0, devices) * (rng.random(devices) < 0.9),
        full_band_upload_s=10 ** rng.uniform(-2, 0.5, devices)
        * (rng.random(devices) < 0.9),
        noise_scale=10 ** rng.uniform(-1, 2, devices),
        weight=rng.uniform(0.2, 1, devices),
        least=least,
        most=least + rng.integers(0, 8, devices),
        constant_s=float(rng.integers(0, 2) * rng.random()),
    )


def brute_force(problem: BatchProblem) -> float:
    bounds = zip(problem.least, problem.most, strict=True)
    tried = itertools.product(*(range(low, high + 1) for low, high in bounds))
    return max(problem.rate(np.array(batches)) for batches in tried)


@pytest.mark.parametrize("first", rest_slow(range(0, _INSTANCES, _AT_ONCE)))
def test_brute_force_finds_nothing_better_and_nothing_beyond_the_bound(
    first: int,
) -> None:
    for seed in range(first, first + _AT_ONCE):
        problem = small_problem(np.random.default_rng(seed))
        if not problem.compute_s(problem.least).any():
            continue
        found = own_batches(problem)
        best = brute_force(problem)
        assert (problem.least <= found.batch_size).all()
        assert (found.batch_size <= problem.most).all()
        assert math.isclose(found.rate, problem.rate(found.batch_size))
        # Whole examples are a coarse grid where there are so few of them.
        assert best * 0.97 <= found.rate <= best * (1 + 1e-12), seed
        assert best <= found.bound * (1 + 1e-9), seed


@pytest.mark.parametrize("seed", rest_slow(range(40), fast=6))
def test_with_many_examples_the_bound_is_as_good_as_reached(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices = int(rng.integers(2, 25))
    problem = BatchProblem(
        fixed_s=rng.uniform(0, 1, devices) * rng.integers(0, 2),
        example_s=10 ** rng.uniform(-3, -1, devices),
        full_band_upload_s=10 ** rng.uniform(-2, 0.5, devices),
        noise_scale=10 ** rng.uniform(1, 3, devices),
        weight=np.ones(devices),
        least=np.full(devices, 8),
        most=np.full(devices, 4096),
        constant_s=float(rng.integers(0, 2)),
    )
    assert 0 <= own_batches(problem).gap < 5e-3


def test_slow_devices_are_given_fewer_examples_and_noisy_blocks_more() -> None:
    problem = BatchProblem(
        fixed_s=np.zeros(3),
        example_s=np.array([0.01, 0.1, 0.01]),
        full_band_upload_s=np.ones(3),
        noise_scale=np.array([100.0, 100.0, 10.0]),
        weight=np.ones(3),
        least=np.ones(3, np.int64),
        most=np.full(3, 10_000),
    )
    usual, slow, clear = own_batches(problem).batch_size
    assert slow < clear < usual


def test_a_round_that_waits_anyway_is_filled_with_examples() -> None:
    problem = BatchProblem(
        fixed_s=np.zeros(2),
        example_s=np.array([0.01, 0.01]),
        full_band_upload_s=np.array([0.0, 1e6]),
        noise_scale=np.full(2, 50.0),
        weight=np.ones(2),
        least=np.ones(2, np.int64),
        most=np.array([300, 200]),
    )
    assert own_batches(problem).batch_size.tolist() == [300, 200]


def test_the_grid_is_solved_exactly_and_what_cannot_win_is_not_solved() -> None:
    rng = np.random.default_rng(0)
    batches, errors = [8, 16, 32, 64], [1e-2, 1e-6, 0.0]
    solved: set[tuple[int, int]] = set()
    for _ in range(50):
        length = np.cumsum(rng.random((len(errors), len(batches))), axis=0) + 0.5
        progress = rng.random(len(batches))
        missing = int(rng.integers(0, 8))

        rounds = {
            (b, level): Tried(
                progress=float(progress[n]),
                round_s=float(length[level, n]),
                bound_s=float(length[level, n]),
            )
            for level in range(len(errors))
            for n, b in enumerate(batches)
            if n != missing
        }

        def attempt(
            batch: int, level: int, rounds: dict[tuple[int, int], Tried] = rounds
        ) -> Tried | None:
            solved.add((batch, level))
            return rounds.get((batch, level))

        solved.clear()
        found = best_candidate(batches, errors, attempt)
        rates = {k: t.rate / (1 + errors[k[1]]) ** 0.5 for k, t in rounds.items()}
        best = max(rates, key=lambda key: rates[key])
        assert found == best
        assert len(solved) < len(batches) * len(errors)
    assert best_candidate(batches, errors, lambda *_: None) is None
