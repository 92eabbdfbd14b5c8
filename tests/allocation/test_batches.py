"""Batches: brute force agrees, bounds hold, and the grid's best is exact."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation.batches import (
    BatchProblem,
    Candidate,
    Tried,
    best_candidate,
    own_batches,
    progress,
)
from tests.marks import rest_slow

_INSTANCES = 300
_AT_ONCE = 15


def small_problem(rng: np.random.Generator, devices: int = 3) -> BatchProblem:
    """Draw an instance whose batches can all be tried; some parts of it are 0."""
    least = rng.integers(1, 3, devices)
    problem = BatchProblem(
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
    return at_pace(problem, rng.uniform(0.2, 2.0) * rng.integers(0, 4))


def at_pace(problem: BatchProblem, times: float = 1.0) -> BatchProblem:
    """Let a second be worth so many times what it brings with the least batches."""
    least = problem.least
    if not (round_s := problem.round_s(least)):
        return problem
    return replace(problem, pace=times * float(problem.progress(least)) / round_s)


def many_examples(rng: np.random.Generator) -> BatchProblem:
    """Draw an instance in which an example more or less hardly counts."""
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
    return at_pace(problem, rng.uniform(0.5, 1.5))


def brute_force(problem: BatchProblem) -> float:
    bounds = zip(problem.least, problem.most, strict=True)
    tried = itertools.product(*(range(low, high + 1) for low, high in bounds))
    return max(problem.gain(np.array(batches)) for batches in tried)


@pytest.mark.parametrize("first", rest_slow(range(0, 200, 25)))
def test_no_fraction_of_an_example_is_beyond_the_bound_which_one_reaches(
    first: int,
) -> None:
    for seed in range(first, first + 25):
        rng = np.random.default_rng(seed)
        problem = small_problem(rng, devices=2 - seed % 2)
        problem = replace(problem, example_s=problem.example_s + 1e-3)
        if seed % 4:  # else some upload nothing
            uploads_s = problem.full_band_upload_s + 1e-2
            problem = replace(problem, full_band_upload_s=uploads_s)
        found = own_batches(problem)
        steps = 13 if problem.least.size == 2 else 150
        ranges = np.linspace(problem.least, problem.most, steps).T
        best = max(problem.gain(np.array(b)) for b in itertools.product(*ranges))
        brought = float(problem.progress(found.batch_size))
        assert best <= found.bound + 1e-9, seed
        assert found.bound <= max(best, found.gain) + 1e-2 * brought, seed


def test_progress_is_a_power_of_the_signal_s_share() -> None:
    shares = progress(np.array([3, 1, 0]), np.array([1.0, 1.0, 1.0]))
    np.testing.assert_allclose(shares, [0.75**0.75, 0.5**0.75, 0.0])


@pytest.mark.parametrize("times", [1e-6, 1e5])
def test_batches_do_not_depend_on_units(times: float) -> None:
    """Neither on that of time, nor on that of progress."""
    for seed in range(3):
        problem = many_examples(np.random.default_rng(seed))
        found = own_batches(problem)
        slower = replace(
            problem,
            fixed_s=times * problem.fixed_s,
            example_s=times * problem.example_s,
            full_band_upload_s=times * problem.full_band_upload_s,
            constant_s=times * problem.constant_s,
            pace=problem.pace / times,
        )
        heavier = replace(
            problem, weight=times * problem.weight, pace=times * problem.pace
        )
        for other, factor in ((slower, 1.0), (heavier, times)):
            same = own_batches(other)
            assert math.isclose(same.gain, factor * found.gain, rel_tol=1e-3)
            assert math.isclose(same.bound, factor * found.bound, rel_tol=1e-3)


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
        assert math.isclose(found.gain, problem.gain(found.batch_size))
        # Whole examples are a coarse grid where there are so few of them.
        brought = float(problem.progress(found.batch_size))
        assert best - 0.03 * brought <= found.gain <= best + 1e-12, seed
        assert best <= found.bound + 1e-9, seed


@pytest.mark.parametrize("seed", rest_slow(range(40), fast=6))
def test_with_many_examples_the_bound_is_as_good_as_reached(seed: int) -> None:
    problem = many_examples(np.random.default_rng(seed))
    found = own_batches(problem)
    brought = float(problem.progress(found.batch_size))
    assert 0 <= found.bound - found.gain < 5e-3 * brought


def drawn_round(rng: np.random.Generator) -> BatchProblem:
    """Draw the links of a round; processors and blocks are always the same."""
    return BatchProblem(
        fixed_s=np.full(4, 0.1),
        example_s=np.array([0.005, 0.01, 0.02, 0.04]),
        full_band_upload_s=rng.exponential(size=4),
        noise_scale=np.full(4, 200.0),
        weight=np.full(4, 0.25),
        least=np.full(4, 8),
        most=np.full(4, 512),
        constant_s=0.5,
    )


def brought_and_taken(problem: BatchProblem, pace: float) -> tuple[float, float]:
    batch_size = own_batches(replace(problem, pace=pace)).batch_size
    return float(problem.progress(batch_size)), problem.round_s(batch_size)


@pytest.mark.parametrize("seed", rest_slow(range(10)))
def test_by_the_pace_rounds_bring_more_in_all_than_by_each_one_s_own_best(
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    rounds = [drawn_round(rng) for _ in range(20)]
    own = []
    for problem in rounds:
        pace = 0.0
        for _ in range(8):
            brought, taken_s = brought_and_taken(problem, pace)
            pace = brought / taken_s
        own.append((brought, taken_s))
    # As in a run: the pace is that of the rounds so far.
    so_far = (0.0, 0.0)
    run = []
    for problem, first in zip(rounds, own, strict=True):
        pace = so_far[0] / so_far[1] if so_far[1] else first[0] / first[1]
        run.append(brought_and_taken(problem, pace))
        so_far = so_far[0] + run[-1][0], so_far[1] + run[-1][1]
    by_own, by_pace = (
        sum(b for b, _ in each) / sum(t for _, t in each) for each in (own, run)
    )
    assert by_pace > by_own


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
    usual, slow, clear = own_batches(at_pace(problem)).batch_size
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
    for n_th in range(50):
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
        pace = None if n_th % 2 else float(rng.random())
        found = best_candidate(batches, errors, attempt, pace=pace)
        left = {
            key: tried.progress / (1 + errors[key[1]]) ** 0.75
            for key, tried in rounds.items()
        }
        worth = {
            key: left[key] / tried.round_s
            if pace is None
            else left[key] - pace * tried.round_s
            for key, tried in rounds.items()
        }
        best = max(worth, key=lambda key: worth[key])
        assert found is not None and found[:2] == best
        assert math.isclose(found.rate, left[best] / rounds[best].round_s)
        assert len(solved) < len(batches) * len(errors)
    assert best_candidate(batches, errors, lambda *_: None) is None


def solved_of(
    errors: list[float], rounds: dict[tuple[int, int], Tried], **options: bool
) -> tuple[Candidate | None, list[tuple[int, int]]]:
    """Return the best candidate, and what was solved for it."""
    solved: list[tuple[int, int]] = []

    def attempt(batch: int, level: int) -> Tried:
        solved.append((batch, level))
        return rounds[batch, level]

    batches = sorted({batch for batch, _ in rounds})
    return best_candidate(batches, errors, attempt, **options), solved


def tried(progress: float, seconds: float) -> Tried:
    return Tried(progress=progress, round_s=seconds, bound_s=0.9 * seconds)


def test_a_finer_codec_whose_bound_cannot_win_is_not_solved() -> None:
    rounds = {
        (8, 0): tried(1.0, 0.5),
        (16, 0): tried(1.2, 1.0),
        (8, 1): tried(1.0, 0.6),
        (16, 1): tried(1.2, 1.1),
    }
    found, solved = solved_of([1.0, 0.5], rounds)
    # With less noise a second of it brings 1.2 / 1.5 ** 0.75 / 0.9 = 0.98 at most, and
    # of the small batch 1 / 1.5 ** 0.75 / 0.6 = 1.23.
    assert solved == [(8, 0), (16, 0), (8, 1)]
    assert found is not None and found[:2] == (8, 1)
    assert math.isclose(found.rate, 1.5**-0.75 / 0.6)


def test_where_finer_codecs_may_be_shorter_all_are_solved() -> None:
    rounds = {
        (8, 0): tried(1.0, 1.0),
        (16, 0): tried(3.0, 1.0),
        (8, 1): tried(1.0, 0.1),
        (16, 1): tried(3.0, 1.0),
    }
    found, solved = solved_of([0.0, 0.0], rounds, finer_is_longer=False)
    assert len(solved) == 4 and found is not None and found[:2] == (8, 1)
