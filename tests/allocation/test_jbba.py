import numpy as np
import pytest
from allocation_oracle import brute_force_s, fleet_problem, random_problem

from lola_flwr.allocation import (
    AllocationProblem,
    InfeasibleAllocation,
    PowerLimitedUplink,
    RoundMode,
    allocate,
)
from lola_flwr.allocation.edges import edges_of
from lola_flwr.allocation.jbba import DualPoint, _Ascent, dual_bound
from lola_flwr.allocation.shares import best_deadline


class TestDualBound:
    def test_any_multipliers_bound_the_optimum(self):
        rng = np.random.default_rng(31)
        tightest = 0.0
        for _ in range(200):
            problem = random_problem(rng, 6, 3)
            best_s = brute_force_s(problem) - problem.constant_s
            multiplier = rng.dirichlet(np.full(6, rng.choice([0.1, 1.0, 10.0])))
            least = problem.full_band_upload_s.min(axis=1)
            y = np.sqrt(rng.random() * min(best_s, 1e3))
            involvement = -2 * y * np.sqrt(multiplier * least)
            involvement += rng.choice([0.0, 0.1, 10.0]) * rng.normal(size=6)
            found = dual_bound(edges_of(problem), DualPoint(multiplier, involvement, y))
            if best_s == np.inf:
                assert found is None
                continue
            bound_s, _ = found
            assert bound_s <= best_s * (1 + 1e-9)
            tightest = max(tightest, bound_s / best_s)
        assert tightest > 0.4  # the test would be empty if all bounds were useless

    def test_involvement_step_is_the_exact_maximiser(self):
        rng = np.random.default_rng(32)
        problem = fleet_problem(rng, 8, 4)
        edges = edges_of(problem)
        multiplier, y = rng.dirichlet(np.ones(8)), 1.5
        best = -2 * y * np.sqrt(multiplier * problem.full_band_upload_s.min(axis=1))
        highest, _ = dual_bound(edges, DualPoint(multiplier, best, y))
        for _ in range(50):
            other = best + rng.normal(size=8)
            assert dual_bound(edges, DualPoint(multiplier, other, y))[0] <= (
                highest + 1e-12
            )

    def test_single_device_bound_is_tight(self):
        # One device, one block: the bound is c + 2 y sqrt(tau) - y**2, tau at its best.
        problem = AllocationProblem([[3.0]], [[4.0]])
        point = DualPoint(np.ones(1), np.zeros(1), 2.0)
        assert dual_bound(edges_of(problem), point)[0] == pytest.approx(7.0)

    def test_what_is_impossible_stays_so_at_a_multiplier_of_0(self):
        edges = edges_of(AllocationProblem(np.ones((2, 2)), np.ones((2, 2))))
        cost_s = np.array([[np.inf, 2.0], [1.0, 1.0]])
        point = DualPoint(np.array([0.0, 1.0]), np.zeros(2), 1.0)
        _, (rows, blocks) = dual_bound(edges, point, cost_s)
        assert dict(zip(rows, blocks, strict=True)) == {0: 1, 1: 0}


class TestDualAscent:
    @pytest.mark.parametrize("mode", [RoundMode(), RoundMode(participation="all")])
    def test_every_iteration_bounds_the_optimum(self, mode):
        rng = np.random.default_rng(33)
        for i in range(30):
            given = fleet_problem(rng, 12, 6) if i % 2 else random_problem(rng, 7, 3)
            problem = AllocationProblem(
                given.compute_s, given.full_band_upload_s, given.feasible, mode=mode
            )
            try:
                best_s = allocate(problem).round_s
            except InfeasibleAllocation:
                continue
            bounds, rounds = [], []

            def log(bound_s, round_s, bounds=bounds, rounds=rounds):
                bounds.append(bound_s)
                rounds.append(round_s)

            allocation = allocate(problem, "jbba", max_iterations=60, on_iteration=log)
            allocation.check(problem)
            assert all(bound_s <= best_s * (1 + 1e-9) for bound_s in bounds)
            assert all(round_s >= best_s * (1 - 1e-9) for round_s in rounds)
            assert rounds == sorted(rounds, reverse=True)
            assert allocation.bound_s == pytest.approx(
                max(bounds, default=allocation.bound_s)
            )

    def test_starts_from_crunch_and_never_ends_above_it(self):
        rng = np.random.default_rng(34)
        for _ in range(10):
            problem = fleet_problem(rng)
            start_s = allocate(problem, "crunch+shares").round_s
            none = allocate(problem, "jbba", max_iterations=0)
            assert none.round_s == start_s and none.stop_reason == "iterations"
            assert allocate(problem, "jbba").round_s <= start_s

    def test_ascent_raises_the_best_bound(self):
        problem = fleet_problem(np.random.default_rng(35))
        bounds = [
            allocate(problem, "jbba", max_iterations=n).bound_s for n in (1, 20, 200)
        ]
        assert bounds[0] < bounds[1] < bounds[2]

    def test_steps_are_those_of_the_dual(self):
        problem = fleet_problem(np.random.default_rng(40), 6, 4)
        edges = edges_of(problem)
        start_s = allocate(problem, "crunch").round_s
        ascent = _Ascent(edges, start_s, 0.3)
        price, y = np.full(6, 1 / 6), np.sqrt(start_s / 2)
        bound_s, deadline_s = 0.0, start_s
        for number in range(1, 5):
            involvement = -2 * y * np.sqrt(price * problem.full_band_upload_s[:, 0])
            too_slow = problem.compute_s + problem.full_band_upload_s >= deadline_s
            cost_s = np.where(too_slow, np.inf, problem.compute_s)
            value_s, (rows, blocks) = dual_bound(
                edges, DualPoint(price, involvement, y), cost_s
            )
            assert ascent.step() == pytest.approx(value_s)
            c = problem.compute_s[rows, blocks]
            tau = problem.full_band_upload_s[rows, blocks]
            bound_s = max(bound_s, value_s)
            deadline_s = min(deadline_s, best_deadline(c, tau))
            assert ascent.bound_s == pytest.approx(bound_s)
            assert ascent.deadline_s == pytest.approx(deadline_s)
            # A device's latency at the share that the prices would have it take.
            latency_s = np.zeros(6)
            latency_s[rows] = c + tau / (np.sqrt(price[rows] * tau) / y)
            demanded = np.sqrt(price[rows] * tau).sum()
            price = price * np.exp(0.3 / np.sqrt(number) * latency_s / latency_s.max())
            price = price / price.sum()
            y = (y + demanded) / 2
            assert ascent._multiplier == pytest.approx(price)
            assert ascent._root_band_price == pytest.approx(y)

    def test_multipliers_stay_above_nothing_and_sum_to_one(self):
        problem = fleet_problem(np.random.default_rng(41), 40, 2)
        ascent = _Ascent(edges_of(problem), allocate(problem, "crunch").round_s, 9.0)
        for _ in range(60):
            ascent.step()
            assert ascent._multiplier.sum() == pytest.approx(1.0, rel=1e-12)
            assert ascent._multiplier.min() >= 0.99e-9
        assert ascent._multiplier.min() < 1.01e-9  # the border is reached

    @pytest.mark.parametrize("factor", [1e-6, 1e6])
    def test_the_unit_of_time_does_not_matter(self, factor):
        given = fleet_problem(np.random.default_rng(42))
        scaled = AllocationProblem(
            given.compute_s * factor, given.full_band_upload_s * factor
        )
        first, second = (
            allocate(p, "jbba", max_iterations=30, gap_tolerance=0.6)
            for p in (given, scaled)
        )
        assert first.stop_reason == "gap"
        assert second.iterations == first.iterations
        assert second.bound_s == pytest.approx(factor * first.bound_s, rel=1e-6)
        assert second.round_s == pytest.approx(factor * first.round_s, rel=1e-6)

    def test_what_every_round_takes_is_no_part_of_the_ascent(self):
        given = fleet_problem(np.random.default_rng(43))
        start_s = allocate(given, "crunch+shares").round_s
        logs = []
        for constant_s in (0.0, 1e3):
            problem = AllocationProblem(
                given.compute_s, given.full_band_upload_s, constant_s=constant_s
            )
            log = []
            allocate(
                problem,
                "jbba",
                max_iterations=5,
                gap_tolerance=0.0,
                on_iteration=lambda *pair, log=log: log.append(pair),
            )
            logs.append(np.array(log) - constant_s)
        assert logs[0] == pytest.approx(logs[1], rel=1e-9)
        assert np.all(logs[0][:, 1] <= start_s)

    def test_a_late_device_has_its_multiplier_raised(self):
        # Two devices, one block each; device 0 computes for 9 s, device 1 for 1 s.
        problem = AllocationProblem([[9.0, 9.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
        ascent = _Ascent(edges_of(problem), 11.0, 0.3)
        ascent.step()
        late, early = ascent._multiplier
        assert late > 0.5 > early > 0.0

    def test_more_payload_on_one_block_is_carried(self):
        rng = np.random.default_rng(36)
        given = fleet_problem(rng, 8, 4)
        upload_s = given.full_band_upload_s * np.array([3.0, 1.0, 1.0, 0.2])
        problem = AllocationProblem(given.compute_s, upload_s)
        best_s = allocate(problem).round_s
        allocation = allocate(problem, "jbba")
        assert 0.5 * best_s < allocation.bound_s <= best_s
        assert allocation.round_s <= 1.03 * best_s

    @pytest.mark.parametrize("fleets", [40, pytest.param(200, marks=pytest.mark.slow)])
    def test_close_to_exact_in_the_reference_setting(self, fleets):
        rng = np.random.default_rng(37)
        excess = []
        for _ in range(fleets):
            problem = fleet_problem(rng)
            best_s = allocate(problem).round_s
            excess.append(allocate(problem, "jbba").round_s / best_s - 1)
        assert np.mean(excess) <= 0.03
        assert np.max(excess) <= 0.15


class TestStops:
    def test_on_the_gap(self):
        problem = fleet_problem(np.random.default_rng(38))
        allocation = allocate(problem, "jbba", gap_tolerance=0.6)
        assert allocation.stop_reason == "gap" and allocation.gap <= 0.6
        assert 0 < allocation.iterations < 200

    def test_on_iterations(self):
        problem = fleet_problem(np.random.default_rng(38))
        allocation = allocate(problem, "jbba", max_iterations=7)
        assert (allocation.stop_reason, allocation.iterations) == ("iterations", 7)

    def test_on_time(self):
        problem = fleet_problem(np.random.default_rng(38))
        allocation = allocate(problem, "jbba", time_limit_s=0.0)
        assert (allocation.stop_reason, allocation.iterations) == ("time", 0)

    def test_on_no_gap_at_all(self):
        for times, iterations in ((np.zeros((3, 2)), 0), (np.ones((1, 1)), 1)):
            problem = AllocationProblem(times, times)
            allocation = allocate(problem, "jbba", gap_tolerance=0.0)
            assert allocation.stop_reason == "gap"
            assert allocation.iterations == iterations

    def test_not_before_the_time(self):
        problem = fleet_problem(np.random.default_rng(38))
        allocation = allocate(problem, "jbba", max_iterations=2, time_limit_s=3600)
        assert (allocation.stop_reason, allocation.iterations) == ("iterations", 2)

    def test_by_default_after_200_steps_of_at_first_0_3(self):
        problem = fleet_problem(np.random.default_rng(38))
        allocation = allocate(problem, "jbba")
        assert (allocation.stop_reason, allocation.iterations) == ("iterations", 200)
        same = allocate(problem, "jbba", gap_tolerance=1e-3, step_size=0.3)
        assert same.bound_s == allocation.bound_s
        other = allocate(problem, "jbba", step_size=0.4)
        assert other.bound_s != allocation.bound_s

    def test_a_cut_that_leaves_nothing_proves_the_incumbent(self):
        # One device: CRUNCH is optimal, and no edge can beat it.
        allocation = allocate(AllocationProblem([[1.0]], [[2.0]]), "jbba")
        assert (allocation.stop_reason, allocation.gap) == ("gap", 0.0)

    def test_power_limited_devices_are_refused(self):
        problem = AllocationProblem(
            [[1.0]], [[1.0]], power_limited=PowerLimitedUplink([3.0])
        )
        with pytest.raises(ValueError, match="power_limited"):
            allocate(problem, "jbba")
