"""JCPBA's rates of pruning and shares of the band, against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.errors import UserError
from simulations.compare.pruning_rates import (
    PruningProblem,
    best_rates,
    by_descent,
    jointly,
    shares_for,
)

SOLVERS = (by_descent, jointly)


def drawn(rng, count=3, **fields):
    compute_s, upload_s = rng.lognormal(0, 1, count), rng.lognormal(-1, 1, count)
    return PruningProblem(
        **{
            "compute_s": compute_s,
            "upload_s": upload_s,
            "compute_saved_s": compute_s * rng.uniform(0.3, 1.0, count),
            # Of some, nothing that is uploaded is pruned.
            "upload_saved_s": upload_s * rng.choice([0.0, 0.5, 0.9], count),
            "weights": rng.uniform(0.5, 2.0, count),
            "mean_rate": float(rng.choice([0.0, 0.1, 0.3, 0.6])),
            "max_rate": float(rng.choice([0.6, 0.9])),
            **fields,
        }
    )


def grid(problem, steps):
    """Give all rates of a grid that the mean allows, shape [G, K]."""
    axis = np.linspace(0, problem.max_rate, steps)
    rates = np.array([*itertools.product(axis, repeat=problem.compute_s.size)])
    return rates[rates @ problem.budget <= problem.mean_rate * (1 + 1e-12)]


def splits(count, steps):
    """Give all shares of a grid, shape [G, K]."""
    parts = itertools.product(range(1, steps), repeat=count - 1)
    whole = np.array([(*p, steps - sum(p)) for p in parts if sum(p) < steps])
    return whole / steps


def ends_s(problem, rates, shares):
    """Time of each pair of rates and shares, spelled out, shape [R, S]."""
    rates, shares = rates[:, None, :], shares[None, :, :]
    computed = problem.compute_s - rates * problem.compute_saved_s
    uploads = problem.upload_s - rates * problem.upload_saved_s
    return (computed + uploads / shares).max(axis=2)


def test_no_point_of_a_grid_is_ahead_of_the_joint_solution(rng):
    for count, steps, cut in ((1, 50, 2), (2, 25, 60), (3, 9, 24)):
        for _ in range(4):
            problem = drawn(rng, count)
            of_grid = ends_s(problem, grid(problem, steps), splits(count, cut)).min()
            found = jointly(problem).round_s
            assert found <= of_grid * (1 + 1e-9)
            # And the grid comes near: the solver claims nothing that cannot be.
            assert found >= 0.7 * of_grid


def test_each_step_of_the_descent_is_the_best_for_what_it_holds(rng):
    for _ in range(10):
        problem = drawn(rng)
        shares = rng.dirichlet(np.ones(3))
        rates = best_rates(problem, shares)
        found = problem.ends_s(rates, shares).max()
        of_grid = ends_s(problem, grid(problem, 13), shares[None]).min()
        assert 0.9 * of_grid - 1e-9 <= found <= of_grid * (1 + 1e-9)
        split = shares_for(problem, rates)
        found = problem.ends_s(rates, split).max()
        of_grid = ends_s(problem, rates[None], splits(3, 40)).min()
        assert found <= of_grid * (1 + 1e-9)


def test_plans_keep_to_the_limits_and_say_what_they_take(rng):
    for _ in range(25):
        problem = drawn(rng, int(rng.integers(1, 9)))
        for solve in SOLVERS:
            plan = solve(problem)
            assert (plan.rates >= 0).all()
            assert (plan.rates <= problem.max_rate).all()
            assert plan.rates @ problem.budget <= problem.mean_rate * (1 + 1e-12)
            assert (plan.shares > 0).all()
            assert plan.shares.sum() <= 1
            last_s = problem.ends_s(plan.rates, plan.shares).max()
            assert plan.round_s == plan.steps_s[-1] == pytest.approx(last_s)


def test_the_descent_never_rises_and_the_joint_solution_is_no_later(rng):
    behind = []
    for _ in range(25):
        problem = drawn(rng, 5)
        plan, best = by_descent(problem), jointly(problem)
        steps_s = np.array(plan.steps_s)
        assert (steps_s[1:] <= steps_s[:-1] * (1 + 1e-9)).all()
        assert best.round_s <= plan.round_s * (1 + 1e-12)
        behind.append(plan.round_s / best.round_s)
    # What the module says: neither step alone can then do better, and both can.
    assert max(behind) > 1.05


@pytest.mark.parametrize("field", ["compute_s", "upload_s"])
def test_a_slower_device_ends_no_round_earlier(rng, field):
    for _ in range(10):
        problem = drawn(rng)
        slower = getattr(problem, field) * np.array([1.0, 1.5, 1.0])
        later = replace(problem, **{field: slower})
        assert jointly(later).round_s >= jointly(problem).round_s * (1 - 1e-9)


@pytest.mark.parametrize(
    ("field", "values"),
    [("mean_rate", (0.0, 0.2, 0.4, 0.6)), ("max_rate", (0.3, 0.5, 0.7, 0.9))],
)
def test_the_more_may_be_pruned_the_earlier_a_round_ends(rng, field, values):
    for _ in range(5):
        problem = drawn(rng, mean_rate=0.3, max_rate=0.9)
        times = [jointly(replace(problem, **{field: v})).round_s for v in values]
        assert (np.diff(times) <= 1e-9 * times[0]).all()


def test_at_the_borders():
    same = PruningProblem(
        compute_s=np.ones(4),
        upload_s=np.full(4, 0.1),
        compute_saved_s=np.full(4, 0.8),
        upload_saved_s=np.full(4, 0.05),
        weights=np.ones(4),
        mean_rate=0.5,
        max_rate=0.5,
    )
    for solve in SOLVERS:
        # As the mean allows the highest rate, all have it; without one, nobody prunes.
        plan = solve(same)
        np.testing.assert_allclose(plan.rates, 0.5)
        np.testing.assert_allclose(plan.shares, 0.25)
        assert plan.round_s == pytest.approx(0.6 + 4 * 0.075)
        none = solve(replace(same, mean_rate=0.0))
        assert not none.rates.any()
        assert none.round_s == pytest.approx(1.4)
        # Whoever waits for another anyway does not prune.
        slow = replace(same, compute_s=np.array([1.0, 1.0, 1.0, 9.0]), mean_rate=0.1)
        assert solve(slow).rates == pytest.approx([0, 0, 0, 0.4], abs=1e-9)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"upload_s": np.ones(2)}, r"upload_s has shape \(2,\), and compute_s \(3,\)"),
        ({"weights": np.array([1, 0, 1.0])}, "weights of device 1 is 0.0; it must be"),
        ({"compute_saved_s": np.array([1, 1, 0.0])}, "compute_saved_s of device 2"),
        ({"upload_saved_s": np.array([-1, 0, 0.0])}, "upload_saved_s of device 0"),
        ({"compute_s": np.array([9, np.nan, 9])}, "compute_s of device 1 is nan"),
        ({"upload_s": np.zeros(3)}, "upload_s of device 0 is 0.0"),
        ({"mean_rate": 0.7, "max_rate": 0.6}, "mean_rate=0.7 and max_rate=0.6 of"),
        ({"mean_rate": float("nan")}, "mean_rate=nan and max_rate="),
        ({"max_rate": 1.0}, "and max_rate=1.0 of pruning must be at least 0 and below"),
    ],
)
def test_a_problem_that_is_none_is_refused_in_one_line(rng, fields, said):
    with pytest.raises(UserError, match=said) as refused:
        drawn(rng, **fields)
    assert "\n" not in str(refused.value)
