"""The energy allocators against brute force, and what they promise."""

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import (
    ENERGY_ALLOCATORS,
    AllocationProblem,
    EnergyCosts,
    InfeasibleAllocation,
    PowerLimitedUplink,
    RoundMode,
    allocate,
    energy_search,
)
from lola_flwr.allocation.energy import solve_energy
from lola_flwr.allocation.energy_search import least_energy
from lola_flwr.allocation.energy_table import EnergyTable
from lola_flwr.errors import UserError
from tests.allocation.allocation_oracle import (
    all_modes,
    fleet_problem,
    least_share,
    matchings,
    random_problem,
)
from tests.marks import rest_slow

BOTH = pytest.mark.parametrize("name", ENERGY_ALLOCATORS)
_BISECTIONS = 60


def brute_force_j(problem, deadline_s, name):
    """Least energy over all matchings with their best shares; inf if there is none."""
    devices, blocks = matchings(problem)
    tau = problem.full_band_upload_s[devices, blocks]
    left = deadline_s - problem.constant_s - problem.compute_s[devices, blocks]
    snr = None if problem.power_limited is None else problem.power_limited.snr[devices]
    least = np.where(left < 0, np.inf, least_share(tau, left, snr))
    fits = least.sum(axis=1) <= 1 + 1e-11
    devices, blocks, least, tau = devices[fits], blocks[fits], least[fits], tau[fits]
    left, snr = left[fits], None if snr is None else snr[fits]
    if not devices.size:
        return np.inf
    compute_j = problem.energy.compute_j[devices, blocks]
    watts = problem.energy.transmit_w[devices]
    full_j = watts * tau
    if name == "energy":
        # Shares of max(least, t * root), by bisection on t.
        root = np.sqrt(full_j)
        low, high = np.zeros(len(root)), np.full(len(root), 1e9)
        for _ in range(2 * _BISECTIONS):
            middle = (low + high) / 2
            within = np.maximum(least, middle[:, None] * root).sum(axis=1) <= 1
            low, high = np.where(within, middle, low), np.where(within, high, middle)
        share = np.maximum(least, low[:, None] * root)
        sent_j = full_j / np.where(share > 0, share, 1)
        return (compute_j + sent_j).sum(axis=1).min()
    low, high = compute_j.max(axis=1), (compute_j + watts * left).max(axis=1)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        with np.errstate(all="ignore"):
            affordable_s = (middle[:, None] - compute_j) / watts
        allowed_s = np.where(watts > 0, np.minimum(affordable_s, left), left)
        share = least_share(tau, allowed_s, snr)
        within = np.maximum(share, least).sum(axis=1) <= 1 + 1e-12
        low, high = np.where(within, low, middle), np.where(within, middle, high)
    return high.min()


def random_energy(rng, problem):
    """Any powers; some devices send for nothing."""
    compute_w = rng.exponential(size=problem.num_devices) * 10 ** rng.uniform(-1, 1)
    transmit_w = rng.exponential(size=problem.num_devices) * 10 ** rng.uniform(-2, 2)
    transmit_w *= rng.random(problem.num_devices) < 0.85
    costs = EnergyCosts.of_powers(problem.compute_s, compute_w, transmit_w)
    return replace(problem, energy=costs)


def alike(rng, problem):
    """All devices are one another's twins, but perhaps for their powers."""
    num_devices = problem.num_devices
    problem = replace(
        problem,
        compute_s=np.repeat(problem.compute_s[:1], num_devices, axis=0),
        full_band_upload_s=np.repeat(problem.full_band_upload_s[:1], num_devices, 0),
        feasible=np.ones((num_devices, problem.num_blocks), bool),
    )
    problem = random_energy(rng, problem)
    if rng.random() < 0.5:
        costs = problem.energy
        rows = np.zeros(num_devices, int)
        problem = replace(problem, energy=costs.of_rows(rows))
    return problem


def instance(seed, power_limited=False):
    """A small problem, of 1 to 5 devices, and the slack that there is."""
    rng = np.random.default_rng([seed, power_limited])
    while True:
        sizes = rng.integers(1, 6), rng.integers(1, 5)
        mode = rng.choice(list(all_modes(rng, *sizes).values()))
        problem = random_problem(rng, *sizes, mode=mode, power_limited=power_limited)
        make = alike if rng.random() < 0.2 else random_energy
        problem = make(rng, problem)
        slack = rng.choice([0.0, 0.0, 0.01, 0.1, 0.5, 2.0])
        try:
            return problem, slack, allocate(problem).round_s
        except InfeasibleAllocation:
            continue


def objective(name, problem, allocation):
    joules = allocation.joules(problem)
    return joules.sum() if name == "energy" else joules.max()


def promises_hold(name, problem, slack, shortest_s):
    deadline_s = (1 + slack) * shortest_s
    found = allocate(problem, name, slack=slack)
    found.check(problem)
    least_j = brute_force_j(problem, deadline_s * (1 + 1e-12), name)
    assert found.round_s <= deadline_s * (1 + 1e-9)
    assert found.stop_reason == "optimal"
    assert objective(name, problem, found) == pytest.approx(least_j, rel=1e-7)
    assert found.bound_j == pytest.approx(least_j, rel=1e-7)
    assert found.bound_s == pytest.approx(shortest_s)


@BOTH
@pytest.mark.parametrize("part", rest_slow(range(24)))
def test_equals_brute_force(name, part):
    for seed in range(20 * part, 20 * (part + 1)):
        promises_hold(name, *instance(seed))


@pytest.mark.parametrize("part", rest_slow(range(12)))
def test_the_worst_of_power_limited_devices_equals_brute_force(part):
    for seed in range(5 * part, 5 * (part + 1)):
        promises_hold("energy-worst", *instance(seed, power_limited=True))


def twins(seed, num_devices, num_blocks, mode, of_each):
    """Problems in which the band's price often does not decide."""
    rng = np.random.default_rng(seed)
    kinds = num_devices // of_each
    costs = rng.exponential(size=(2, kinds, num_blocks))
    watts = 3 * rng.exponential(size=(2, kinds))
    compute_s, upload_s = np.repeat(costs, of_each, axis=1)
    return AllocationProblem(
        compute_s,
        upload_s,
        mode=mode,
        energy=EnergyCosts.of_powers(compute_s, *np.repeat(watts, of_each, axis=1)),
    )


@pytest.mark.parametrize(
    ("sizes", "mode", "of_each"),
    rest_slow(
        [
            ((5, 4), RoundMode(), 1),
            ((6, 3), RoundMode(), 2),
            ((6, 3), RoundMode(devices_per_block=2), 2),
            ((6, 3), RoundMode(devices_per_block=[1, 2, 1]), 3),
            ((6, 3), RoundMode(participation="all"), 2),
            ((5, 2), RoundMode(participation="all"), 1),
        ]
    ),
)
def test_divided_matchings_equal_brute_force(sizes, mode, of_each, monkeypatch):
    divided = []
    divide = energy_search._Search._divided

    def noted(search, part):
        divided.append(seed)
        return divide(search, part)

    monkeypatch.setattr(energy_search._Search, "_divided", noted)
    for seed in range(40):
        problem = twins(seed, *sizes, mode, of_each)
        slack = (0.02, 0.1, 0.3)[seed % 3]
        shortest_s = allocate(problem).round_s
        promises_hold("energy", problem, slack, shortest_s)
    assert len(set(divided)) >= 2


def two_devices(**changes):
    """A fast device that draws much, and a slow one that draws little; one block."""
    seconds = np.array([[1.0], [1.5]])
    values = {
        "compute_s": seconds,
        "full_band_upload_s": np.ones((2, 1)),
        "energy": EnergyCosts.of_powers(seconds, [10.0, 2.0], [4.0, 1.0]),
        "device_names": ["fast", "frugal"],
    }
    return AllocationProblem(**{**values, **changes})


@BOTH
def test_by_hand(name):
    problem = two_devices()
    # The shortest round takes the fast one 2 s: 10 W for 1 s, and 4 W for 1 s.
    now = allocate(problem, name, slack=0.0)
    assert now.block_of_device.tolist() == [0, -1]
    assert now.joules(problem) == pytest.approx([14.0, 0.0])
    # With half a second more there is time for the other: 2 W for 1.5 s, 1 W for 1 s.
    later = allocate(problem, name, slack=0.25)
    assert later.block_of_device.tolist() == [-1, 0]
    assert later.joules(problem) == pytest.approx([0.0, 4.0])
    assert later.bound_j == pytest.approx(4.0)


@BOTH
def test_no_longer_than_it_may_be(name):
    problem = two_devices()
    assert allocate(problem, name, slack=1.0, longest_s=2.4).round_s == pytest.approx(2)
    with pytest.raises(InfeasibleAllocation, match=r"longest_s=1\.9 s: .* takes 2 s"):
        allocate(problem, name, longest_s=1.9)
    with pytest.raises(UserError, match=r"slack must be at least 0, but is -0\.1"):
        allocate(problem, name, slack=-0.1)


@BOTH
def test_who_does_not_say_what_it_draws_is_named(name):
    costs = EnergyCosts.of_powers(np.ones((2, 1)), [3.0, np.nan], [1.0, 1.0])
    with pytest.raises(UserError, match=r"do not say: frugal\. State compute-power-w"):
        allocate(two_devices(energy=costs), name)
    with pytest.raises(UserError, match=r"do not say: fast, frugal\. State"):
        allocate(two_devices(energy=None), name)


def test_where_nothing_is_known_no_energy_is():
    problem = two_devices(energy=None)
    joules = allocate(problem).joules(problem)
    assert np.isnan(joules[0])
    assert joules[1] == 0.0  # idle


def test_the_sum_of_power_limited_devices_is_refused():
    problem = two_devices(power_limited=PowerLimitedUplink([10.0, 10.0]))
    with pytest.raises(UserError, match="'energy' knows devices of uniform power"):
        allocate(problem, "energy")
    assert allocate(problem, "energy-worst", slack=1.0).joules(problem).max() < 14


def test_devices_without_transmit_power_cost_nothing_to_send():
    problem = two_devices(
        energy=EnergyCosts.of_powers(np.array([[1.0], [1.5]]), [10.0, 2.0], [0.0, 0.0])
    )
    for name in ENERGY_ALLOCATORS:
        found = allocate(problem, name, slack=0.25)
        assert found.joules(problem).tolist() == [0.0, 3.0]
        assert found.round_s == pytest.approx(2.5)


@BOTH
def test_backups_and_spare_devices(name):
    rng = np.random.default_rng(3)
    problem = random_energy(rng, fleet_problem(rng, 8, 4))
    mode = RoundMode(backups=2)
    found = allocate(replace(problem, mode=mode), name, slack=0.1)
    assert np.count_nonzero(found.block_of_device >= 0) == 6


def parts_of_a_round(seed, max_parts):
    rng = np.random.default_rng(seed)
    problem = random_energy(rng, fleet_problem(rng, 12, 6))
    return problem, solve_energy(problem, slack=0.1, max_parts=max_parts)


@pytest.mark.slow
def test_a_gap_is_stated_where_the_search_ends_early():
    gaps = []
    for seed in range(20):
        problem, best = parts_of_a_round(seed, 2_000)
        least_j = best.joules(problem).sum()
        assert best.stop_reason == "optimal"
        problem, early = parts_of_a_round(seed, 0)
        early_j = early.joules(problem).sum()
        assert early.bound_j <= least_j * (1 + 1e-9)
        assert least_j <= early_j * (1 + 1e-9)
        gaps.append(early_j / early.bound_j - 1)
        assert early.stop_reason == ("gap" if gaps[-1] > 1e-9 else "optimal")
    assert max(gaps) > 1e-6


def test_rows_that_cannot_matter_are_left_out():
    left_out = 0
    for seed in range(30):
        problem = twins(seed, 9, 3, RoundMode(), 1)
        found = least_energy(EnergyTable.of(problem, 0.1, np.inf), 10_000)
        deadline_s = 1.1 * allocate(problem).round_s
        least_j = brute_force_j(problem, deadline_s, "energy")
        assert found.energy_j == pytest.approx(least_j, rel=1e-9)
        left_out += problem.num_devices - len(found.table.edges.devices)
    assert left_out > 10


def test_rows_of_any_matching_within_the_gap_matter():
    within = 0
    for seed in range(40):
        problem = twins(seed, 8, 3, RoundMode(), 1)
        search = energy_search._Search(EnergyTable.of(problem, 0.1, np.inf))
        whole = search.bounded(search.whole, 40)
        if whole is None:
            continue  # there is no gap
        cost, _ = search._cost_at(whole.price)
        cost = np.where(search._possible, cost, np.inf)
        devices, blocks = matchings(problem)
        values = cost[devices, blocks].sum(axis=1) - whole.price
        may_be_better = np.unique(devices[values < search.energy_j])
        rows, _ = search.rows_that_matter(whole)
        assert set(may_be_better) <= set(rows)
        within += may_be_better.size
    assert within > 20


def test_who_is_held_elsewhere_is_not_exchanged_for_its_twin():
    problem = twins(0, 3, 2, RoundMode(devices_per_block=[2, 1]), 3)
    search = energy_search._Search(EnergyTable.of(problem, 0.1, np.inf))
    part = replace(search.whole, forced=((0, 0),), divides_at=(1, 0))
    held, without = search._divided(part)
    assert held.forced == ((0, 0), (1, 0))
    assert without.banned.tolist() == [[False, False], [True, False], [True, False]]


@pytest.mark.parametrize(
    ("compute_j", "transmit_w", "says"),
    [
        ([[1.0]], [-1.0], r"transmit_w must be finite .* transmit_w\[0\]=-1"),
        ([[np.inf]], [1.0], r"compute_j must be finite .* compute_j\[0, 0\]=inf"),
        ([1.0], [1.0], r"compute_j must have 2 axes, but is \(1,\)"),
    ],
)
def test_impossible_energy_is_refused(compute_j, transmit_w, says):
    with pytest.raises(UserError, match=says):
        EnergyCosts(compute_j, transmit_w)


def test_energy_has_the_shape_of_the_problem():
    costs = EnergyCosts(np.ones((3, 1)), np.ones(3))
    with pytest.raises(UserError, match=r"energy.compute_j is \(3, 1\)"):
        two_devices(energy=costs)
