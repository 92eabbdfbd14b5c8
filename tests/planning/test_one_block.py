"""Devices that train one block alone, beside others: against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.build import AllocationOptions
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.planning import Known, RunStatement, solve_round
from lola_flwr.run.values import to_values
from lola_flwr.server.state import RunState
from lola_flwr.system.devices import simulated_device
from tests.marks import rest_slow
from tests.server.coordinators import PARTITION, SHAPES, honest_reply, make_coordinator
from tests.zeroth_order.test_zeroth_order import settings


def costs_of(num_blocks):
    shapes = {
        "embed.w": (9, 4),
        **{f"layer.{n}.w": (4, 4 + n % 3) for n in range(num_blocks)},
        "head.w": (2, 4),
    }
    return estimate_costs(
        shapes, partition_parameters(shapes), batch_size=8, sequence_length=4
    )


def fleet_of(rng, num_devices):
    """Return random devices of which some train one block alone."""
    return [
        replace(
            simulated_device(n, seed=int(rng.integers(1000))),
            name=f"d{n}",
            trains_one_block=bool(rng.random() < 0.6),
        )
        for n in range(num_devices)
    ]


def earliest_s(compute_s, upload_s):
    """Return when all can be done, by bisection."""
    low, high = (compute_s + upload_s).max(), compute_s.max() + upload_s.sum()
    for _ in range(60):
        middle = 0.5 * (low + high)
        fits = np.sum(upload_s / (middle - compute_s)) <= 1.0
        low, high = (low, middle) if fits else (middle, high)
    return high


def best_cover(run, fleet, rate_bps, worth):
    """Return what the best cover is worth, its devices, and when it is done."""
    num_blocks = len(worth)
    spans = [*itertools.combinations_with_replacement(range(num_blocks), 2)]
    best = (0.0, 0, 0.0)
    for count in range(1, len(fleet) + 1):
        for path in itertools.combinations(spans, count):
            if any(one[1] >= two[0] for one, two in itertools.pairwise(path)):
                continue
            parts = [list(range(a, b + 1)) for a, b in path]
            joined = run.costs.joined(parts)
            firsts = [part[0] for part in parts]
            covered = worth[np.concatenate(parts)].sum()
            for rows in itertools.permutations(range(len(fleet)), count):
                pairs = zip(rows, parts, strict=True)
                if any(fleet[k].trains_one_block and len(p) > 1 for k, p in pairs):
                    continue
                speed = np.array([fleet[k].flops_per_s for k in rows])
                seconds = earliest_s(
                    joined.flops[firsts] / speed,
                    joined.payload_bits[firsts] / rate_bps[[*rows]],
                )
                best = max(best, (covered, count, -seconds))
    return best


@pytest.mark.parametrize("seed", rest_slow(range(40), fast=8))
def test_spans_of_a_mixed_fleet_are_the_best(seed):
    rng = np.random.default_rng(seed)
    num_blocks = int(rng.integers(2, 6))
    fleet = fleet_of(rng, int(rng.integers(1, min(num_blocks, 4))))
    run = RunStatement(
        costs=costs_of(num_blocks), allocation=AllocationOptions(codec_slack=0.0)
    )
    updates = rng.integers(0, 4, num_blocks)
    known = replace(Known.at_first(run, fleet), block_updates=updates)
    solved = solve_round(run, known)
    stated, allocation = solved.stated, solved.allocation
    given = {row: stated.blocks(block) for row, block in solved.active()}
    for row, blocks in given.items():
        assert len(blocks) == 1 or not stated.profiles[row].trains_one_block
    worth = 1.0 + updates.max() - updates
    trained = np.concatenate([*given.values()])
    covered, count, earliest = best_cover(run, fleet, known.drawn(run), worth)
    assert (worth[trained].sum(), len(given)) == (covered, count)
    assert allocation.round_s == pytest.approx(-earliest, rel=1e-9)
    assert allocation.bound_s == pytest.approx(-earliest, rel=1e-9)


def with_fleet(num_one_block, num_others, memory_bytes=1e9, **options):
    """Return a coordinator of three blocks, and its devices' ids: o0, o1, ..., d0."""
    coordinator = make_coordinator(num_devices=0, **options)
    names = [f"o{n}" for n in range(num_one_block)]
    names += [f"d{n}" for n in range(num_others)]
    for index, name in enumerate(names):
        profile = replace(
            simulated_device(index, seed=1),
            name=name,
            memory_bytes=memory_bytes,
            trains_one_block=name.startswith("o"),
        )
        coordinator.add_device(name, profile.to_properties())
    return coordinator, names


def test_they_alone_train_fewer_blocks_a_round_which_take_turns():
    coordinator, ids = with_fleet(2, 0)
    updates = np.zeros(3, int)
    for server_round in range(1, 4):
        plan = coordinator.plan_round(server_round, ids)
        assert [len(a.blocks) for a in plan.assignments.values()] == [1, 1]
        replies = [honest_reply(plan, device) for device in plan.assignments]
        coordinator.complete_round(plan, replies)
        updates[[a.block_index for a in plan.assignments.values()]] += 1
    assert updates.tolist() == [2, 2, 2]


def test_what_a_device_trains_outlives_a_checkpoint():
    coordinator, ids = with_fleet(1, 1)
    coordinator.plan_round(1, ids)
    state = RunState.from_values(to_values(coordinator.state))
    assert [state.fleet.profiles[d].trains_one_block for d in ids] == [True, False]


@pytest.mark.parametrize("num_one_block", [0, 1, 3])
def test_windows_are_one_block_long_where_somebody_trains_no_more(num_one_block):
    coordinator, ids = with_fleet(num_one_block, 4, returned_by=3)
    plan = coordinator.plan_round(1, ids)
    lengths = [len(plan.assignments[d].blocks) for d in ids]
    assert lengths == [1 if num_one_block else 3] * len(ids)


def test_they_do_nothing_but_a_whole_step_of_one_block():
    """Where all devices are to do something else, the others do."""
    sizes = {"batch_size": 4000, "sequence_length": 4}
    costs = estimate_costs(SHAPES, PARTITION, **sizes)
    too_little = {"batch_size": 4000, "memory_bytes": 1.01 * costs.memory_bytes[1]}
    for options, asked in (
        ({"zeroth_order": settings(use="always")}, "direction_seed"),
        ({"train_all": True}, "trains_all"),
        ({"reduced_schedules": True, **too_little}, "operations"),
    ):
        coordinator, ids = with_fleet(2, 1, **options)
        assignments = coordinator.plan_round(1, ids).assignments
        assert len(assignments) == 3
        told = {d: bool(getattr(a, asked)) for d, a in assignments.items()}
        assert told == {"o0": False, "o1": False, "d0": True}, asked
