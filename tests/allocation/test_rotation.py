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
    rotation,
)
from lola_flwr.allocation.matching import cheapest_matching
from lola_flwr.allocation.rotation import _fewest_meetings
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
            assert rotated.iterations == best.iterations
            if rotated is not best:
                assert rotated.stop_reason == "rotation"
                rotated_some += 1
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

    def test_what_every_round_takes_is_slack_for_the_rest(self):
        rng = np.random.default_rng(71)
        for _ in range(10):
            given = fleet_problem(rng, 8, 4)
            meetings = rng.integers(0, 5, size=(8, 4))
            round_s = allocate(given).round_s
            later = replace(given, constant_s=2 * round_s)
            # A tenth of three times as much is three tenths of it.
            for problem, eps in ((given, 0.3), (later, 0.1)):
                rotated = rotate(problem, allocate(problem), meetings, eps=eps)
                if problem is given:
                    expected = rotated.block_of_device.tolist()
            assert rotated.block_of_device.tolist() == expected

    def test_any_slack_but_none_is_used(self):
        problem = AllocationProblem(np.ones((3, 1)), np.ones((3, 1)))
        best = allocate(problem)
        meetings = np.zeros((3, 1), dtype=int)
        meetings[best.device_of_block[0]] = 1
        for eps in (1e-9, 1.0, 1e9):
            assert met(rotate(problem, best, meetings, eps=eps), meetings) == 0


def lagrangian_choice(points):
    """Last vertex within the band of the lower hull of (band, meetings); or None.

    What no price on the band prefers to all others is not on the hull.
    """
    hull = []
    for band, meetings in sorted(points):
        if hull and meetings >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (b1, m1), (b2, m2) = hull[-2:]
            if (m1 - m2) * (band - b1) > (m1 - meetings) * (b2 - b1):
                break
            hull.pop()
        hull.append((band, meetings))
    within = [vertex for vertex in hull if vertex[0] <= 1.0]
    return within[-1] if within else None


@pytest.mark.parametrize("everybody", [False, True])
def test_the_choice_is_the_best_that_a_price_on_the_band_can_find(everybody):
    rng = np.random.default_rng(70)
    mode = RoundMode(participation="all" if everybody else "needed")
    problem = AllocationProblem(np.ones((5, 3)), np.ones((5, 3)), mode=mode)
    devices, blocks = matchings(problem)
    several = none = 0
    for _ in range(150):
        counts = rng.integers(0, 9, size=(5, 3))
        # The scarcer the pairs, the larger their shares: something is to be chosen.
        least_share = np.minimum(
            rng.choice([0.6, 1.2, 9.0]) / (1 + counts) * rng.random((5, 3)), 1.0
        )
        share = np.where(least_share < 1, least_share, np.inf)
        points = {
            (float(share[d, b].sum()), int(counts[d, b].sum()))
            for d, b in zip(devices, blocks, strict=True)
        }
        expected = lagrangian_choice(points)
        # Where nothing is computed, they are the uploads' times in a second.
        problem = AllocationProblem(np.zeros((5, 3)), least_share, mode=mode)
        chosen = _fewest_meetings(problem, counts, 1.0)
        if expected is None:
            none += 1
            assert chosen is None
            continue
        assert (chosen.band, chosen.meetings) == pytest.approx(expected)
        several += expected not in (min(points), min((m, b) for b, m in points)[::-1])
    assert several > 20
    assert none > 5


def choice(*candidates):
    """Of (share, meetings): who joins a device that has met nobody and takes half."""
    size = len(candidates) + 1
    counts, least_share = np.zeros((size, 2), dtype=int), np.ones((size, 2))
    least_share[0, 1] = 0.5
    least_share[1:, 0], counts[1:, 0] = zip(*candidates, strict=True)
    problem = AllocationProblem(np.zeros((size, 2)), least_share)
    chosen = _fewest_meetings(problem, counts, 1.0)
    return chosen.band, chosen.meetings


@pytest.mark.parametrize(
    "others",
    [
        [(0.1, 3)],  # the whole band for the fewest meetings of all
        [(0.9, 0)],  # for the least band of all
        [(0.1, 9), (0.9, 0)],  # for what lies between
    ],
)
def test_the_whole_band_may_be_taken(others):
    meetings = 3 if others[-1][1] == 0 else 0
    assert choice((0.5, meetings), *others) == (1.0, meetings)


@pytest.mark.parametrize("order", [1, -1])
def test_beyond_the_band_by_rounding_is_beyond_it(order):
    # Beside 8 meetings the two shares are the same number.
    candidates = [(0.5, 8), (0.5 + 2.0**-52, 8)]
    assert choice(*candidates[::order]) == (1.0, 8)


def test_no_price_is_tried_that_finds_nothing_new(monkeypatch):
    tried = []

    def counted(*arguments, **options):
        tried.append(arguments)
        return cheapest_matching(*arguments, **options)

    monkeypatch.setattr(rotation, "cheapest_matching", counted)
    assert choice((0.1, 9), (0.4, 3), (0.9, 0)) == (0.9, 3)
    # Fewest meetings, least band, what lies between, and that there is no more.
    assert len(tried) == 4
