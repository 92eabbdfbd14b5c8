from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.allocation import (
    AllocationProblem,
    PowerLimitedUplink,
    RoundMode,
    allocate,
    refine_payloads,
)
from lola_flwr.allocation.shares import best_deadline, with_best_shares


def instance(seed, num_devices=5, num_blocks=4, **options):
    rng = np.random.default_rng(seed)
    problem = AllocationProblem(
        rng.uniform(0.5, 3, (num_devices, num_blocks)),
        rng.lognormal(0, 1, (num_devices, 1)) * rng.uniform(0.5, 2, num_blocks),
        **options,
    )
    bits = np.array([1, 2, 4])[:, None] * rng.uniform(1e6, 3e6, num_blocks)
    return problem, bits


seeds = st.integers(0, 10_000)


@given(seeds, st.sampled_from([0.0, 0.05, 0.3, 2.0]), st.booleans())
def test_the_bound_holds_and_the_answer_checks(seed, slack, power_limited):
    snr = np.random.default_rng(seed).uniform(0.5, 50, 5)
    options = {"power_limited": PowerLimitedUplink(snr)} if power_limited else {}
    problem, bits = instance(seed, constant_s=0.25, **options)
    coarsest = allocate(problem)
    refined_problem, refined, level = refine_payloads(
        problem, coarsest, bits, slack=slack
    )
    refined.check(refined_problem)
    assert refined.round_s <= (1 + slack) * coarsest.round_s * (1 + 1e-9)
    np.testing.assert_array_equal(refined.block_of_device, coarsest.block_of_device)
    assert (level[coarsest.block_of_device < 0] == 0).all()
    if level.any():
        assert refined.stop_reason == "payloads"
        assert refined.iterations == coarsest.iterations > 0
        assert refined.bound_s == coarsest.bound_s
    factor = (bits / bits[0])[level]
    np.testing.assert_allclose(
        refined_problem.full_band_upload_s, problem.full_band_upload_s * factor
    )


@given(seeds, st.sampled_from([0.05, 0.3, 1.0]), st.booleans())
def test_no_choice_of_payloads_within_the_bound_gives_more_devices_the_next(
    seed, slack, power_limited
):
    """Brute force over all choices: level by level, as many as can have it."""
    snr = np.random.default_rng(seed).uniform(0.01, 50, 5)
    options = {"power_limited": PowerLimitedUplink(snr)} if power_limited else {}
    problem, bits = instance(seed, **options)
    coarsest = allocate(problem)
    _, _, level = refine_payloads(problem, coarsest, bits, slack=slack)
    devices = np.flatnonzero(coarsest.block_of_device >= 0)
    blocks = coarsest.block_of_device[devices]
    compute_s = problem.compute_s[devices, blocks]
    upload_s = problem.full_band_upload_s[devices, blocks]
    longest = (1 + slack) * coarsest.round_s
    most = 0
    for choice in product([0, 1], repeat=len(devices)):
        factor = (bits / bits[0])[list(choice), blocks]
        deadline = best_deadline(compute_s, upload_s * factor, problem.snr_of(devices))
        if deadline <= longest * (1 - 1e-9):
            most = max(most, sum(choice))
    assert (level[devices] >= 1).sum() >= most


def test_without_slack_best_shares_leave_no_room():
    problem, bits = instance(3)
    coarsest = allocate(problem)
    _, same, level = refine_payloads(problem, coarsest, bits, slack=0.0)
    assert same is coarsest
    assert not level.any()


def test_the_fastest_uplinks_get_the_finest_payloads():
    problem = AllocationProblem(
        np.ones((4, 4)), np.array([[0.01], [0.1], [1.0], [10.0]]) * np.ones(4)
    )
    bits = np.array([1, 2, 4])[:, None] * np.ones(4)
    _, _, level = refine_payloads(problem, allocate(problem), bits, slack=0.05)
    assert level.tolist() == [2, 2, 0, 0]


def test_where_computing_takes_all_the_time_everybody_sends_the_finest():
    problem, bits = instance(0)
    fast = AllocationProblem(problem.compute_s, problem.full_band_upload_s * 1e-4)
    _, _, level = refine_payloads(fast, allocate(fast), bits, slack=0.1)
    assert sorted(level) == [0, 2, 2, 2, 2]


def test_equal_shares_leave_room_even_without_slack():
    problem, bits = instance(5, mode=RoundMode(participation="all"))
    coarsest = allocate(problem, "crunch")
    _, refined, level = refine_payloads(problem, coarsest, bits, slack=0.0)
    assert level.any()
    assert refined.round_s <= coarsest.round_s * (1 + 1e-9)


def test_fixed_payloads_stay_as_they_are():
    problem, bits = instance(2)
    fixed = np.array([True, False, True, False, True])
    refined_problem, _, level = refine_payloads(
        problem, allocate(problem), bits, slack=50.0, fixed=fixed
    )
    assert (level[fixed] == 0).all()
    assert level.any()
    np.testing.assert_array_equal(
        refined_problem.full_band_upload_s[fixed], problem.full_band_upload_s[fixed]
    )


def test_the_whole_band_may_not_be_enough():
    # One device has all of it: twice the payload takes twice the time, no less.
    problem = AllocationProblem([[1.0]], [[1.0]])
    coarsest = allocate(problem)
    for slack, expected in ((0.49, 0), (0.51, 1), (1.51, 2)):
        *_, level = refine_payloads(problem, coarsest, [[1], [2], [4]], slack=slack)
        assert level.tolist() == [expected]


def test_the_band_may_be_used_up_to_its_end():
    problem = AllocationProblem(np.zeros((2, 2)), np.ones((2, 2)))
    coarsest = replace(allocate(problem), round_s=2.0)  # not a rounding error more
    *_, level = refine_payloads(problem, coarsest, np.array([[1, 1], [2, 2]]), slack=1)
    assert level.tolist() == [1, 1]


def test_among_equals_the_first_get_the_finer_payload():
    # The uplink of every other device is twice as slow as those between.
    upload_s = (1.0 + np.arange(40) % 2)[:, None] * np.ones(40)
    problem = AllocationProblem(np.ones((40, 40)), upload_s)
    coarsest = allocate(problem, lambda p: with_best_shares(p, *2 * [np.arange(40)]))
    bits = np.array([[1], [2]]) * np.ones(40)
    *_, level = refine_payloads(problem, coarsest, bits, slack=0.66)
    assert level[0::2].tolist() == [1] * 20
    assert level[1::2].tolist() == [1] * 10 + [0] * 10


def test_payloads_of_single_precision_lose_nothing():
    problem, bits = instance(0)
    single = (bits * [[1.0], [1.1], [1.3]]).astype(np.float32)
    refined, _, level = refine_payloads(problem, allocate(problem), single, slack=50)
    factor = single.astype(np.float64) / single[0].astype(np.float64)
    np.testing.assert_array_equal(
        refined.full_band_upload_s, problem.full_band_upload_s * factor[level]
    )


def test_negative_slack():
    problem, bits = instance(0)
    with pytest.raises(ValueError, match="slack must be at least 0, but is -1"):
        refine_payloads(problem, allocate(problem), bits, slack=-1)
