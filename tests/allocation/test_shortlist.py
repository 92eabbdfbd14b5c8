import numpy as np
import pytest
from allocation_oracle import all_modes, fleet_problem, random_problem

from lola_flwr.allocation import (
    AllocationProblem,
    InfeasibleAllocation,
    RoundMode,
    allocate,
    jbba,
    rotate,
    shortlist,
)
from tests.marks import rest_slow


def whole(monkeypatch):
    monkeypatch.setattr(shortlist, "_WHOLE_FLEET", 10**9)


def pruned(monkeypatch, rows):
    """Every fleet is pruned, and every pass takes several steps."""
    monkeypatch.setattr(shortlist, "_WHOLE_FLEET", 0)
    monkeypatch.setattr(shortlist, "_ROWS_A_STEP", rows)


@pytest.mark.parametrize("rows", [7, 4096])
@pytest.mark.parametrize("levels", [2, 3, 10**9])
def test_the_cheapest_of_each_block_and_of_equal_ones_the_first(
    rows, levels, monkeypatch
):
    pruned(monkeypatch, rows)
    rng = np.random.default_rng(25)
    for devices_per_block in (1, [2, 0, 1]):
        given = np.ceil(rng.random((2, 30, 3)) * levels)
        given[0][rng.random((30, 3)) < 0.5] = np.inf
        mode = RoundMode(devices_per_block=devices_per_block)
        problem = AllocationProblem(*given, mode=mode)
        blocks = np.flatnonzero(problem.demand)
        cost = given.sum(axis=0)[:, blocks]
        nearest = np.argsort(cost, axis=0, kind="stable")[:3]  # 3 slots
        nearest = nearest[np.isfinite(np.take_along_axis(cost, nearest, axis=0))]
        left = shortlist.shortlist(problem, lambda edges: edges.latency_s(1.0))
        assert left.devices.tolist() == np.unique(nearest).tolist()
        assert left.blocks.tolist() == blocks.tolist()


def tied(rng, problem):
    """Round the times, so that many pairs take equally long."""
    return AllocationProblem(
        *np.ceil([problem.compute_s, problem.full_band_upload_s]),
        problem.feasible,
        mode=problem.mode,
    )


@pytest.mark.parametrize("name", ["crunch", "crunch+shares", "greedy"])
@pytest.mark.parametrize("rows", rest_slow([4, 1]))
def test_pruned_fleets_have_the_same_allocation(name, rows, monkeypatch):
    rng = np.random.default_rng(26)
    solved = 0
    for number in range(90):
        kind = number % 3
        num_devices, num_blocks = int(rng.integers(3, 12)), int(rng.integers(1, 5))
        mode = rng.choice(list(all_modes(rng, num_devices, num_blocks).values()))
        if kind == 0:
            problem = random_problem(rng, num_devices, num_blocks, mode=mode)
        else:
            given = fleet_problem(rng, num_devices, num_blocks)
            problem = AllocationProblem(
                given.compute_s, given.full_band_upload_s, mode=mode
            )
            problem = tied(rng, problem) if kind == 1 else problem
        whole(monkeypatch)
        try:
            expected = allocate(problem, name)
        except InfeasibleAllocation as error:
            pruned(monkeypatch, rows)
            with pytest.raises(InfeasibleAllocation) as found:
                allocate(problem, name)
            assert str(found.value) == str(error)
            continue
        pruned(monkeypatch, rows)
        found = allocate(problem, name)
        assert found.block_of_device.tolist() == expected.block_of_device.tolist()
        assert found.share.tolist() == expected.share.tolist()
        assert found.round_s == expected.round_s
        solved += 1
    assert solved > 40


def test_pruned_fleets_rotate_alike(monkeypatch):
    rng = np.random.default_rng(27)
    changed = 0
    for _ in range(30):
        num_devices, num_blocks = int(rng.integers(6, 14)), int(rng.integers(1, 4))
        problem = fleet_problem(rng, num_devices, num_blocks)
        meetings = rng.integers(0, 3, size=problem.compute_s.shape)
        whole(monkeypatch)
        best = allocate(problem)
        eps = rng.choice([0.02, 0.2, 1.0])
        expected = rotate(problem, best, meetings, eps=eps)
        pruned(monkeypatch, 2)
        found = rotate(problem, best, meetings, eps=eps)
        assert found.block_of_device.tolist() == expected.block_of_device.tolist()
        assert found.share.tolist() == expected.share.tolist()
        changed += found is not best
    assert changed > 10


@pytest.mark.parametrize("several_payloads", rest_slow([True, False]))
def test_pruned_fleets_climb_alike(several_payloads, monkeypatch):
    rng = np.random.default_rng(28)
    looked_at, improved = [], 0
    for number in range(16):
        num_devices, num_blocks = int(rng.integers(2, 60)), int(rng.integers(1, 4))
        wanted = [1, 2][number % 2] if num_devices > 6 else 1
        given = fleet_problem(rng, num_devices, num_blocks)
        upload_s = given.full_band_upload_s
        if several_payloads:
            upload_s = upload_s * rng.uniform(0.5, 2.0, num_blocks)
        feasible = rng.random(upload_s.shape) < rng.choice([0.6, 1.0])
        problem = AllocationProblem(
            given.compute_s,
            upload_s,
            feasible,
            mode=RoundMode(devices_per_block=wanted),
        )
        whole(monkeypatch)
        try:
            expected = allocate(problem, "jbba", max_iterations=60)
        except InfeasibleAllocation:
            continue
        start_s = allocate(problem, "crunch+shares").round_s
        pruned(monkeypatch, 16)
        found = allocate(problem, "jbba", max_iterations=60)
        assert found.block_of_device.tolist() == expected.block_of_device.tolist()
        assert found.share.tolist() == expected.share.tolist()
        assert found.bound_s == pytest.approx(expected.bound_s, rel=1e-9)
        assert found.iterations == expected.iterations
        assert found.stop_reason == expected.stop_reason
        improved += found.round_s < start_s
        ascent = jbba._ascent(problem, start_s, 0.3)
        for _ in range(5):
            ascent.step()
        looked_at.append(len(ascent._multiplier) / num_devices)
    assert improved > 1
    assert min(looked_at) < 0.6  # most devices are not looked at
