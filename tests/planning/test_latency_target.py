from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest
import scipy.optimize

from lola_flwr.allocation import (
    AllocationProblem,
    InfeasibleAllocation,
    RoundMode,
    allocate,
)
from lola_flwr.errors import UserError
from lola_flwr.planning import most_valuable_blocks
from lola_flwr.planning.latency_target import choose_blocks, fits_any_block
from tests.allocation.allocation_oracle import brute_force_s, random_problem
from tests.marks import rest_slow


def best_value(problem, values, target_s):
    """Largest value of a set of blocks that some matching finishes in time."""
    allowed = np.flatnonzero(problem.demand)
    sets = chain.from_iterable(
        combinations(allowed, size) for size in range(1, allowed.size + 1)
    )
    return max(
        (
            sum(values[list(blocks)])
            for blocks in sets
            if brute_force_s(
                replace(problem, mode=replace(problem.mode, blocks=blocks))
            )
            <= target_s * (1 + 1e-9)
        ),
        default=0.0,
    )


@pytest.mark.parametrize(
    ("devices_per_block", "power_limited"),
    rest_slow([(2, True), (1, False), (1, True), (2, False)], 2),
)
def test_equals_brute_force(power_limited, devices_per_block):
    rng = np.random.default_rng(11)
    fitted = 0
    for _ in range(25):
        mode = RoundMode(devices_per_block=devices_per_block)
        problem = random_problem(rng, 4, 4, power_limited=power_limited, mode=mode)
        values = rng.integers(1, 9, 4).astype(float)
        # Between the fastest block and the slowest: some blocks fit, mostly not all.
        target_s = float(np.quantile(problem.compute_s, rng.uniform(0.2, 1.0))) * 3
        expected = best_value(problem, values, target_s)
        if not expected:
            with pytest.raises(InfeasibleAllocation, match=r"No block"):
                most_valuable_blocks(problem, values, latency_target_s=target_s)
            continue
        # However busy the machine is.
        blocks = choose_blocks(
            problem, values, latency_target_s=target_s, time_limit_s=60.0
        ).blocks
        assert sum(values[list(blocks)]) == expected
        solved = replace(problem, mode=replace(mode, blocks=blocks))
        assert allocate(solved).round_s <= target_s * (1 + 1e-9)
        fitted += 1
    assert fitted >= 15


def test_a_target_that_is_just_met_and_one_that_is_just_missed():
    problem = AllocationProblem(np.array([[1.0, 1.0], [1.0, 1.0]]), np.ones((2, 2)))
    assert allocate(problem).round_s == pytest.approx(3.0)
    assert most_valuable_blocks(problem, [1, 1], latency_target_s=3.0) == (0, 1)
    # Short by less than the tolerance of the integer program's solver.
    assert len(most_valuable_blocks(problem, [1, 2], latency_target_s=3 - 1e-7)) == 1


def test_the_more_valuable_of_two_that_do_not_fit_together():
    problem = AllocationProblem(np.array([[1.0, 1.0], [1.0, 1.0]]), np.ones((2, 2)))
    assert most_valuable_blocks(problem, [2, 1], latency_target_s=2.5) == (0,)
    assert most_valuable_blocks(problem, [1, 2], latency_target_s=2.5) == (1,)


def test_fewer_devices_than_blocks():
    problem = AllocationProblem(np.ones((2, 5)), np.ones((2, 5)))
    assert most_valuable_blocks(problem, [5, 1, 4, 2, 3]) == (0, 2)


def test_blocks_that_nobody_can_hold_are_left_out():
    feasible = np.ones((3, 3), dtype=bool)
    feasible[:, 0] = False
    problem = AllocationProblem(np.ones((3, 3)), np.ones((3, 3)), feasible)
    assert most_valuable_blocks(problem, [9, 1, 1]) == (1, 2)


def test_what_does_not_fit_is_explained():
    problem = AllocationProblem(np.array([[4.0, 3.0]]), np.ones((1, 2)))
    with pytest.raises(InfeasibleAllocation, match=r"block 1, takes 4 s"):
        most_valuable_blocks(problem, [1, 1], latency_target_s=3.5)
    nobody = replace(problem, feasible=np.zeros((1, 2), dtype=bool))
    with pytest.raises(InfeasibleAllocation, match=r"Lower the batch size"):
        most_valuable_blocks(nobody, [1, 1])
    with pytest.raises(UserError, match=r"positive"):
        most_valuable_blocks(problem, [1, 0])
    everyone = replace(problem, mode=RoundMode(participation="all"))
    with pytest.raises(UserError, match=r"participation='needed'"):
        most_valuable_blocks(everyone, [1, 1])


def test_many_devices():
    rng = np.random.default_rng(3)
    problem = AllocationProblem(
        rng.uniform(1, 5, (300, 12)), rng.uniform(0.5, 4, (300, 12))
    )
    whole_s = allocate(problem).round_s
    assert len(most_valuable_blocks(problem, np.ones(12))) == 12
    fewer = most_valuable_blocks(problem, np.ones(12), latency_target_s=whole_s * 0.7)
    assert 1 <= len(fewer) < 12


@pytest.mark.parametrize(("devices_per_block", "count"), rest_slow([(1, 12), (2, 40)]))
def test_out_of_time_it_has_a_set_that_fits_and_says_what_it_may_lack(
    devices_per_block, count
):
    rng = np.random.default_rng(12)
    lacking = 0
    for _ in range(count):
        # Alike payloads on all devices, and values nearly proportional to them.
        upload_s = rng.uniform(0.5, 4, 4)
        problem = AllocationProblem(
            rng.uniform(0.1, 2, (4, 4)),
            np.tile(upload_s, (4, 1)),
            mode=RoundMode(devices_per_block=devices_per_block),
        )
        values = upload_s * rng.uniform(1, 1.01, 4)
        target_s = rng.uniform(0.5, 1.0) * upload_s.sum()
        expected = best_value(problem, values, target_s)
        if not expected:
            with pytest.raises(InfeasibleAllocation, match=r"No block"):
                choose_blocks(
                    problem, values, latency_target_s=target_s, time_limit_s=0.0
                )
            continue
        chosen = choose_blocks(
            problem, values, latency_target_s=target_s, time_limit_s=0.0
        )
        solved = replace(problem, mode=replace(problem.mode, blocks=chosen.blocks))
        assert allocate(solved).round_s <= target_s * (1 + 1e-9)
        worth = values[list(chosen.blocks)].sum()
        assert chosen.gap is not None
        assert chosen.gap >= 0
        assert worth * (1 + chosen.gap) >= expected * (1 - 1e-6)
        lacking += worth < expected
        in_time = choose_blocks(
            problem, values, latency_target_s=target_s, time_limit_s=60.0
        )
        assert in_time.gap is None
        assert values[list(in_time.blocks)].sum() == pytest.approx(expected)
    assert lacking  # else it would not matter


def test_some_block_fits_just_where_one_can_be_chosen():
    rng = np.random.default_rng(13)
    fitting = 0
    for number in range(24):
        mode = RoundMode(devices_per_block=1 + number % 2)
        problem = random_problem(rng, 3, 2, power_limited=number % 3 == 0, mode=mode)
        target_s = float(np.quantile(problem.compute_s, 0.3)) * 2
        fits = fits_any_block(problem, target_s)
        assert fits == (best_value(problem, np.ones(2), target_s) > 0)
        fitting += fits
    assert 4 < fitting < 20


def test_what_the_program_s_solver_prints_is_not_printed(capfd, monkeypatch):
    def milp(*args, solve=scipy.optimize.milp, **options):
        # As HiGHS does in some instances, even where it is told to be quiet.
        ctypes.CDLL(None).puts(b"HighsMipSolverData::transform tmpSolver.run();")
        return solve(*args, **options)

    monkeypatch.setattr(scipy.optimize, "milp", milp)
    problem = AllocationProblem(np.ones((2, 2)), np.ones((2, 2)))
    assert most_valuable_blocks(problem, [1, 1], latency_target_s=3.0) == (0, 1)
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("", "")
