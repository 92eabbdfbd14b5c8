"""Idle devices join blocks within a deadline."""

import numpy as np
import pytest
from allocation_oracle import least_share, random_problem

from lola_flwr.allocation import (
    AllocationProblem,
    InfeasibleAllocation,
    RoundMode,
    allocate,
    share_blocks,
    sharing,
)

MODES = [RoundMode(), RoundMode(backups=1), RoundMode(blocks=(1,))]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_as_many_join_as_there_is_time_for(seed):
    rng = np.random.default_rng(seed)
    joined = 0
    for _ in range(300 if seed else 30):
        mode = MODES[rng.integers(3)]
        power = bool(rng.random() < 0.3)
        problem = random_problem(rng, 7, 3, power_limited=power, mode=mode)
        joined += check(problem, rng.choice([0.0, 0.01, 0.3, 3.0]))
    assert joined > 20


def check(problem, eps):
    """Return how many have joined."""
    try:
        best = allocate(problem)
    except InfeasibleAllocation:
        return 0
    longest_s = (1 + eps) * best.round_s
    shared_problem, shared = share_blocks(problem, best, longest_s=longest_s)
    shared.check(shared_problem)
    assert shared.round_s <= longest_s * (1 + 1e-9)
    active = best.block_of_device >= 0
    np.testing.assert_array_equal(
        shared.block_of_device[active], best.block_of_device[active]
    )
    if shared is best:
        assert shared_problem is problem
    else:
        held = np.bincount(shared.block_of_device[shared.block_of_device >= 0])
        mode = shared_problem.mode
        assert (mode.blocks, mode.backups) == (None, 0)
        assert mode.devices_per_block[: len(held)] == tuple(held)
        assert shared.iterations == best.iterations
    trained = np.unique(best.block_of_device[active])
    assert set(shared.block_of_device) <= {-1, *trained}
    # Nobody else can join: what all need by the deadline leaves too little.
    rows = np.arange(7)
    snr = None if problem.power_limited is None else problem.power_limited.snr
    left = longest_s - problem.constant_s - problem.compute_s
    needed = least_share(
        problem.full_band_upload_s, left, None if snr is None else snr[:, None]
    )
    needed = np.where(problem.feasible & (left > 0), needed, np.inf)
    joined = shared.block_of_device >= 0
    taken = needed[rows[joined], shared.block_of_device[joined]].sum()
    others = needed[np.ix_(~joined, trained)]
    assert others.size == 0 or taken + others.min() > 1 - 1e-9
    return np.count_nonzero(joined) - np.count_nonzero(active)


def test_every_block_has_its_second_device_before_one_has_its_third():
    # Equal devices; the last block is the cheapest for all of them.
    problem = AllocationProblem(np.tile([3.0, 2.0, 1.0], (9, 1)), np.full((9, 3), 0.1))
    best = allocate(problem)
    counts = []
    for eps in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3):
        _, shared = share_blocks(problem, best, longest_s=(1 + eps) * best.round_s)
        blocks = shared.block_of_device[shared.block_of_device >= 0]
        counts.append(np.bincount(blocks, minlength=3))
        assert counts[-1].max() < 3 or counts[-1].min() >= 2
    assert counts[0].sum() == 3
    assert share_blocks(problem, best, longest_s=best.round_s) == (problem, best)
    assert counts[-1].tolist() == [3, 3, 3]
    assert np.all(np.diff([count.sum() for count in counts]) >= 0)


def test_who_has_nothing_to_send_joins_for_nothing():
    upload_s = np.full((4, 2), 1.0)
    upload_s[3] = 0.0
    problem = AllocationProblem(
        np.tile([2.0, 1.0], (4, 1)) * np.array([[1.0], [1.0], [1.0], [9.0]]), upload_s
    )
    best = allocate(problem, "greedy")
    assert best.block_of_device[3] == -1
    best = allocate(problem)
    shared = share_blocks(problem, best, longest_s=20.0)[1]
    assert shared.block_of_device.min() >= 0
    assert shared.stop_reason == "sharing"
    assert shared.bound_s == best.bound_s <= shared.round_s <= 20.0


def test_they_join_up_to_the_last_bit_of_band():
    # By 10 s: half of the band for block 0, an eighth for block 1.
    problem = AllocationProblem(np.zeros((7, 2)), np.tile([5.0, 1.25], (7, 1)))
    best = allocate(problem)
    _, shared = share_blocks(problem, best, longest_s=10.0)
    active = shared.block_of_device[shared.block_of_device >= 0]
    assert np.bincount(active).tolist() == [1, 4]
    assert shared.round_s == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("share", "left", "joining"),
    [
        # Who needs least joins first.
        ([[0.3, 1.0], [1.0, 0.1]], 0.35, [(1, 1)]),
        ([[0.3, 1.0], [1.0, 0.1]], 0.4, [(1, 1), (0, 0)]),
        # The cheapest pair is in no cheapest matching.
        ([[0.1, 0.25], [0.25, 0.5]], 0.2, [(0, 0)]),
        ([[0.1, 0.25], [0.25, 0.5]], 0.05, []),
        # Two of them, and band for one.
        ([[0.1, 0.2, 0.2], [0.1, 0.2, 0.2], [0.15, 0.9, 0.9]], 0.12, [(0, 0)]),
        # At the cap nobody can.
        ([[1.0]], 1.0, []),
        ([[0.0, 1.0], [1.0, 1.0]], 0.0, [(0, 0)]),
    ],
)
def test_a_turn(share, left, joining):
    found = sharing._next_turn(np.array(share), left)
    assert [*zip(*found, strict=True)] == joining
