from dataclasses import replace

import numpy as np
import pytest
from allocation_oracle import fleet_problem, matchings, random_problem

from lola_flwr.allocation import (
    AllocationProblem,
    InfeasibleAllocation,
    PowerLimitedUplink,
    RoundMode,
    allocate,
    rotate,
)
from lola_flwr.allocation.shares import best_deadline


def met(allocation, meetings):
    active = np.flatnonzero(allocation.block_of_device >= 0)
    return meetings[active, allocation.block_of_device[active]].sum()


def fewest_meetings(problem, longest_s, meetings):
    """Brute force over all matchings."""
    devices, blocks = matchings(problem)
    return min(
        meetings[d, b].sum()
        for d, b in zip(devices, blocks, strict=True)
        if best_deadline(problem.compute_s[d, b], problem.full_band_upload_s[d, b])
        + problem.constant_s
        <= longest_s
    )


class TestRotate:
    def test_eps_of_zero_returns_the_optimum_itself(self):
        problem = fleet_problem(np.random.default_rng(61))
        best = allocate(problem)
        meetings = np.ones(problem.compute_s.shape, dtype=int)
        assert rotate(problem, best, meetings, eps=0.0) is best

    def test_nothing_to_gain_returns_the_optimum_itself(self):
        problem = fleet_problem(np.random.default_rng(61))
        best = allocate(problem)
        meetings = np.full(problem.compute_s.shape, 3)
        assert rotate(problem, best, meetings, eps=0.5) is best

    @pytest.mark.parametrize(
        "mode",
        [
            RoundMode(),
            RoundMode(blocks=[0]),
            RoundMode(devices_per_block=2),
            RoundMode(participation="all"),
            RoundMode(backups=1),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("power_limited", [False, True])
    def test_never_above_the_bound_nor_more_meetings(self, mode, power_limited):
        rng = np.random.default_rng(62)
        rotated_some = 0
        for _ in range(40):
            problem = random_problem(rng, 7, 2, mode=mode, power_limited=power_limited)
            meetings = rng.integers(0, 4, size=(7, 2))
            try:
                best = allocate(problem)
            except InfeasibleAllocation:
                continue
            eps = rng.choice([1e-6, 0.05, 0.5, 3.0])
            rotated = rotate(problem, best, meetings, eps=eps)
            rotated.check(problem)
            assert rotated.round_s <= (1 + eps) * best.round_s
            assert met(rotated, meetings) <= met(best, meetings)
            assert rotated.bound_s == best.bound_s
            rotated_some += rotated is not best
        assert rotated_some > 2

    def test_close_to_the_fewest_meetings(self):
        rng = np.random.default_rng(63)
        excess, slack = 0, 0
        for _ in range(80):
            problem = fleet_problem(rng, 6, 4)
            meetings = rng.integers(0, 5, size=(6, 4))
            best = allocate(problem)
            rotated = rotate(problem, best, meetings, eps=0.3)
            fewest = fewest_meetings(problem, 1.3 * best.round_s, meetings)
            assert met(rotated, meetings) >= fewest
            excess += met(rotated, meetings) - fewest
            slack += met(best, meetings) - fewest
        assert excess < 0.25 * slack  # most of what brute force could save is saved

    def test_ample_latency_finds_the_fewest_meetings(self):
        rng = np.random.default_rng(64)
        for _ in range(20):
            problem = fleet_problem(rng, 6, 3)
            meetings = rng.integers(0, 5, size=(6, 3))
            rotated = rotate(problem, allocate(problem), meetings, eps=1e6)
            assert met(rotated, meetings) == fewest_meetings(problem, 1e12, meetings)

    def test_more_pairs_meet_over_the_rounds(self):
        rng = np.random.default_rng(65)
        given = fleet_problem(rng)
        seen = {}
        for eps in (0.0, 0.2):
            meetings = np.zeros(given.compute_s.shape, dtype=int)
            draws = np.random.default_rng(66)
            for _ in range(30):
                fading = draws.exponential(size=(20, 1)) + 0.1
                problem = AllocationProblem(
                    given.compute_s, given.full_band_upload_s / fading
                )
                chosen = rotate(problem, allocate(problem), meetings, eps=eps)
                active = np.flatnonzero(chosen.block_of_device >= 0)
                meetings[active, chosen.block_of_device[active]] += 1
            seen[eps] = np.count_nonzero(meetings)
        assert seen[0.2] > 1.3 * seen[0.0]

    def test_deterministic(self):
        problem = fleet_problem(np.random.default_rng(67))
        meetings = np.random.default_rng(68).integers(0, 9, size=(20, 12))
        first, second = (
            rotate(problem, allocate(problem), meetings, eps=0.1) for _ in range(2)
        )
        assert first.block_of_device.tolist() == second.block_of_device.tolist()

    def test_zero_latency_leaves_nothing_to_give(self):
        problem = AllocationProblem(np.zeros((3, 2)), np.zeros((3, 2)))
        best = allocate(problem)
        meetings = np.ones((3, 2), dtype=int)
        assert rotate(problem, best, meetings, eps=0.5).round_s == 0.0

    @pytest.mark.parametrize(
        ("meetings", "eps", "message"),
        [
            (np.zeros((3, 2)), -0.1, "eps"),
            (np.zeros((3, 2)), float("nan"), "eps"),
            (np.zeros((2, 3)), 0.1, "meetings is"),
            (np.full((3, 2), 0.5), 0.1, "whole numbers"),
            (np.full((3, 2), -1), 0.1, "whole numbers"),
        ],
    )
    def test_bad_input_is_named(self, meetings, eps, message):
        problem = AllocationProblem(np.ones((3, 2)), np.ones((3, 2)))
        with pytest.raises(ValueError, match=message):
            rotate(problem, allocate(problem), meetings, eps=eps)

    def test_power_limited_bound_uses_the_narrow_band(self):
        given = fleet_problem(np.random.default_rng(69), 8, 3)
        problem = replace(given, power_limited=PowerLimitedUplink(np.full(8, 10.0)))
        best = allocate(problem)
        meetings = np.zeros((8, 3), dtype=int)
        active = np.flatnonzero(best.block_of_device >= 0)
        meetings[active] = 7
        rotated = rotate(problem, best, meetings, eps=5.0)
        assert met(rotated, meetings) < met(best, meetings)
