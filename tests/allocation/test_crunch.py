import numpy as np
import pytest
from allocation_oracle import brute_force_equal_shares_s, fleet_problem, random_problem

from lola_flwr.allocation import (
    AllocationProblem,
    InfeasibleAllocation,
    RoundMode,
    allocate,
)
from lola_flwr.allocation.crunch import is_monotone
from lola_flwr.allocation.edges import edges_of


def monotone_problem(rng, num_devices, num_blocks):
    """Latency and memory rise with depth for every device; ties are frequent."""
    steps = rng.integers(0, 3, size=(num_devices, num_blocks)).astype(float)
    compute_s = np.cumsum(steps, axis=1)[:, ::-1]
    upload_s = np.repeat(rng.integers(0, 4, size=(num_devices, 1)), num_blocks, axis=1)
    reach = rng.integers(0, num_blocks + 2, size=(num_devices, 1))
    depth = num_blocks - np.arange(num_blocks)
    return AllocationProblem(compute_s, upload_s, depth <= reach)


def equals_brute_force(problem):
    """Compare; return whether the problem is feasible."""
    best_s = brute_force_equal_shares_s(problem)
    if best_s == np.inf:
        with pytest.raises(InfeasibleAllocation):
            allocate(problem, "crunch")
        return False
    allocation = allocate(problem, "crunch")
    allocation.check(problem)
    assert allocation.round_s == pytest.approx(best_s, rel=1e-12, abs=1e-300)
    return True


class TestCrunch:
    def test_equals_brute_force_on_monotone_instances(self):
        rng = np.random.default_rng(1)
        feasible = 0
        for _ in range(300):
            num_blocks = rng.integers(1, 6)
            problem = monotone_problem(rng, rng.integers(1, 7), num_blocks)
            assert is_monotone(edges_of(problem).latency_s(1.0 / num_blocks))
            feasible += equals_brute_force(problem)
        assert 50 < feasible < 250  # both kinds must occur

    def test_equals_brute_force_without_monotonicity(self):
        rng = np.random.default_rng(2)
        feasible = 0
        for i in range(300):
            problem = random_problem(
                rng, rng.integers(1, 7), rng.integers(1, 5), power_limited=i % 3 == 0
            )
            feasible += equals_brute_force(problem)
        assert 50 < feasible < 280

    @pytest.mark.parametrize(
        "mode",
        [
            RoundMode(blocks=(0, 2)),
            RoundMode(devices_per_block=2),
            RoundMode(devices_per_block=(0, 2, 1)),
            RoundMode(participation="all"),
        ],
        ids=str,
    )
    def test_equals_brute_force_in_every_mode(self, mode):
        rng = np.random.default_rng(3)
        for i in range(40):
            given = monotone_problem(rng, 6, 3) if i % 2 else random_problem(rng, 6, 3)
            problem = AllocationProblem(
                given.compute_s, given.full_band_upload_s, given.feasible, mode=mode
            )
            equals_brute_force(problem)

    def test_counts_and_hopcroft_karp_agree_on_a_large_monotone_fleet(self):
        # A block listed twice in the wrong order breaks monotonicity, not the optimum.
        problem = fleet_problem(np.random.default_rng(4), 60, 12)
        flipped = AllocationProblem(
            problem.compute_s[:, ::-1], problem.full_band_upload_s[:, ::-1]
        )
        assert not is_monotone(edges_of(flipped).compute_s)
        direct, fallback = allocate(problem, "crunch"), allocate(flipped, "crunch")
        assert direct.round_s == pytest.approx(fallback.round_s, rel=1e-12)

    def test_equal_shares_of_one_over_n(self):
        problem = fleet_problem(np.random.default_rng(5))
        share = allocate(problem, "crunch").share
        assert np.count_nonzero(share) == 12
        assert share[share > 0] == pytest.approx(1 / 12)

    def test_best_shares_never_hurt(self):
        rng = np.random.default_rng(6)
        for _ in range(30):
            problem = fleet_problem(rng)
            equal = allocate(problem, "crunch").round_s
            assert allocate(problem, "crunch+shares").round_s <= equal * (1 + 1e-12)

    def test_infeasible_memory_is_never_used(self):
        # Both devices could take both blocks in time, but only device 1 holds block 0.
        problem = AllocationProblem(
            [[1.0, 1.0], [9.0, 1.0]], np.ones((2, 2)), [[False, True], [True, True]]
        )
        assert allocate(problem, "crunch").device_of_block.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("latency_s", "monotone"),
    [
        ([[3.0, 2.0, 2.0], [np.inf, 1.0, 0.0]], True),
        ([[3.0]], True),
        ([[3.0, 1.0, 2.0]], False),
        ([[3.0, 2.0, 1.0], [1.0, 1.0, 2.0]], False),
        ([[2.0, np.inf, 1.0]], False),
    ],
)
def test_monotone_is_no_faster_on_any_deeper_block(latency_s, monotone):
    assert is_monotone(np.array(latency_s)) is monotone
