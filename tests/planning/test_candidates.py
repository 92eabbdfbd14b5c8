from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from lola_flwr.allocation import (
    AllocationProblem,
    InfeasibleAllocation,
    RoundMode,
    allocate,
)
from lola_flwr.allocation.infeasible import is_feasible
from lola_flwr.planning.candidates import WINDOW, beyond_part, narrowed

FREE = np.inf


def problem_of(compute_s, upload_s=None, **options):
    compute_s = np.asarray(compute_s, float)
    if upload_s is None:
        upload_s = np.ones_like(compute_s)
    options.setdefault("required_memory_bytes", np.arange(compute_s.shape[1], 0, -1.0))
    return AllocationProblem(compute_s, upload_s, **options)


def narrow(problem, **changes):
    block_bytes = problem.required_memory_bytes
    options = {
        "longest_s": 1e6,
        "required_bytes": np.tile(block_bytes, (problem.num_devices, 1)),
        "memory_limit_bytes": np.full(problem.num_devices, FREE),
        "failures": [0] * problem.num_devices,
        "block_updates": [0] * problem.num_blocks,
        "partial": False,
        **changes,
    }
    options["memory_limit_bytes"] = np.asarray(options["memory_limit_bytes"], float)
    return narrowed(problem, **options)


def test_who_rests_is_not_asked_while_others_suffice():
    problem = problem_of(np.ones((4, 3)))
    _, chosen = narrow(problem, memory_limit_bytes=[FREE, 0, FREE, FREE])
    assert allocate(chosen).block_of_device[1] == -1


def test_those_that_failed_least_are_taken_back_and_no_more_than_needed():
    problem = problem_of(np.ones((5, 3)))
    limits = [FREE, 0, 0, 0, FREE]
    _, chosen = narrow(problem, memory_limit_bytes=limits, failures=[0, 5, 1, 2, 0])
    assert list(np.flatnonzero(allocate(chosen).block_of_device >= 0)) == [0, 2, 4]


def test_a_device_without_the_memory_gets_a_smaller_block():
    # Device 0 is by far the fastest on block 0, the largest; 3 bytes.
    problem = problem_of([[1, 1, 1], [9, 2, 2], [9, 2, 2]])
    assert allocate(problem).block_of_device[0] == 0
    _, chosen = narrow(problem, memory_limit_bytes=[3, FREE, FREE])
    assert allocate(chosen).block_of_device[0] in (1, 2)


def test_where_all_take_part_resting_devices_are_no_part_of_the_round():
    problem = problem_of(
        np.ones((4, 2)),
        mode=RoundMode(participation="all"),
        device_names=list("abcd"),
        memory_bytes=np.full(4, 9.0),
    )
    rows, chosen = narrow(problem, memory_limit_bytes=[FREE, 0, FREE, FREE])
    assert list(rows) == [0, 2, 3]
    assert chosen.device_names == ["a", "c", "d"]
    assert (allocate(chosen).block_of_device >= 0).all()
    rows, chosen = narrow(problem, memory_limit_bytes=[0, 0, 0, 0])
    assert list(rows) == [0, 1], "two are needed for two blocks"


def test_a_device_that_claims_the_worst_channel_does_not_get_the_band():
    upload_s = np.ones((3, 3))
    upload_s[2] = 1e7
    problem = problem_of(np.ones((3, 3)), upload_s)
    starved = allocate(problem)
    assert starved.share[2] > 0.99 and starved.round_s > 1e6
    _, chosen = narrow(problem, longest_s=3600.0, block_updates=[4, 9, 5])
    allocation = allocate(chosen)
    assert allocation.share[2] == 0
    assert allocation.round_s < 10
    # Two devices are left for three blocks: that with most updates waits.
    assert sorted(allocation.block_of_device) == [-1, 0, 2]


def test_blocks_are_left_out_only_once_a_run_goes():
    problem = problem_of(np.ones((2, 3)))
    with pytest.raises(InfeasibleAllocation, match="2 for 3 blocks"):
        allocate(narrow(problem)[1])
    rows, chosen = narrow(problem, partial=True, block_updates=[1, 0, 0])
    assert list(rows) == [0, 1]
    assert list(chosen.demand) == [0, 1, 1]


def test_nobody_able_is_explained():
    problem = problem_of(np.ones((2, 3)), feasible=np.zeros((2, 3), bool))
    for partial in (False, True):
        with pytest.raises(InfeasibleAllocation, match="No device can compute block 0"):
            allocate(narrow(problem, partial=partial)[1])


@given(st.data())
def test_whatever_is_known_of_devices_a_round_takes_place_if_it_can(data):
    num_devices, num_blocks = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    shape = (num_devices, num_blocks)
    draw_mask = st.lists(
        st.booleans(),
        min_size=num_devices * num_blocks,
        max_size=num_devices * num_blocks,
    )
    participation = data.draw(st.sampled_from(["needed", "all"]))
    problem = problem_of(
        np.ones(shape),
        np.reshape(np.where(data.draw(draw_mask), 1.0, 1e8), shape),
        feasible=np.reshape(data.draw(draw_mask), shape),
        mode=RoundMode(
            devices_per_block=data.draw(st.integers(1, 2)), participation=participation
        ),
    )
    limits = [data.draw(st.sampled_from([0.0, 2.0, FREE])) for _ in range(num_devices)]
    partial = data.draw(st.booleans())
    rows, chosen = narrow(
        problem, longest_s=3600.0, memory_limit_bytes=limits, partial=partial
    )
    useful = problem.feasible & (problem.full_band_upload_s < 1e6)
    # As many pairs as can be at once; scipy's matching is the oracle.
    slots = csr_array(np.repeat(useful, problem.mode.devices_per_block, axis=1))
    most = int((maximum_bipartite_matching(slots) >= 0).sum())
    may_leave_out = partial or is_feasible(problem)
    if most == problem.demand.sum() or (may_leave_out and most > 0):
        allocation = allocate(chosen)
        allocation.check(chosen)
        active = np.flatnonzero(allocation.block_of_device >= 0)
        assert useful[rows[active], allocation.block_of_device[active]].all()
        if participation == "needed":
            assert active.size == most
        else:
            assert list(rows) == [*rows[active]]
    else:
        assert chosen is problem


@given(st.data())
def test_who_is_asked_more_gives_its_part_of_a_block_and_others_suffice(data):
    num_devices, num_blocks = (
        data.draw(st.integers(1, 12)),
        data.draw(st.integers(1, 4)),
    )
    most = data.draw(st.sampled_from([1.0, 2.0, 2.5, np.inf]))
    # Who gave each block's latest updates; of a block that is new, fewer.
    givers = st.lists(st.integers(0, num_devices - 1), max_size=WINDOW)
    counts = np.stack(
        [
            np.bincount(data.draw(givers), minlength=num_devices)
            for _ in range(num_blocks)
        ],
        axis=1,
    )
    able = np.ones_like(counts, dtype=bool)
    beyond = beyond_part(counts, able, most)
    totals = [sum(row) for row in counts.tolist()]
    for (device, block), is_beyond in np.ndenumerate(beyond):
        excess = 10 * totals[device] * num_devices - 11 * sum(totals)
        if not excess:
            continue  # Rounding decides.
        asked_more = excess > 0
        part = max(int(most * WINDOW / num_devices), 1) if most < np.inf else np.inf
        assert is_beyond == (asked_more and counts[device, block] >= part)
    # Nobody is meant where all are asked alike, and never all of those who gave any.
    alike = np.full_like(counts, WINDOW)
    assert not beyond_part(alike, able, most).any()
    assert not beyond.all(axis=1).all() or not counts.any()
