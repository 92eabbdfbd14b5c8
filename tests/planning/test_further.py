"""Rounds in which devices send blocks above their own, too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import RoundMode
from lola_flwr.planning import planned_blocks, solve_round
from tests.planning.test_batches import (
    COSTS,
    EVEN_NOISE,
    GRID,
    even_fleet,
    known,
    statement,
)
from tests.server.coordinators import PARTITION, SHAPES

WIDE = {"further_blocks": True}


def solved_parts(run, devices, **changed):
    before = replace(known(run, devices, EVEN_NOISE), **changed)
    solved = solve_round(run, before)
    return solved, planned_blocks(run, solved)


def sent_blocks(parts) -> list[int]:
    return [b for part in parts for b in (part.block_index, *part.further_blocks)]


def test_devices_send_blocks_that_they_pass_unless_each_is_to_send_one():
    _, parts = solved_parts(statement(**WIDE), even_fleet(3))
    assert len(sent_blocks(parts)) >= 5
    for part in parts:
        end = part.block_index + len(part.further_blocks)
        assert part.further_blocks == (*range(part.block_index + 1, end + 1),)
    _, parts = solved_parts(
        statement(**{**WIDE, "further_blocks": False}), even_fleet(3)
    )
    assert not any(part.further_blocks for part in parts)


def test_a_round_with_further_blocks_brings_more_for_its_time():
    for bandwidth_hz in (2e4, 2e5, 2e6):
        gains = []
        for further in (False, True):
            run = statement(bandwidth_hz=bandwidth_hz, further_blocks=further)
            solved, _ = solved_parts(run, even_fleet(4), pace=0.5)
            brought = solved.brought.progress(EVEN_NOISE)
            gains.append(brought - 0.5 * solved.allocation.round_s)
        assert gains[1] >= gains[0] - 1e-12


def test_times_memory_and_payloads_are_those_of_all_its_blocks():
    run = statement(**WIDE)
    solved, parts = solved_parts(run, even_fleet(3))
    several = [part for part in parts if part.further_blocks]
    assert several
    examples = np.zeros(3, np.int64)
    for part in parts:
        blocks = (part.block_index, *part.further_blocks)
        costs = COSTS.at(part.batch_size).joined([blocks])
        block = part.block_index
        assert part.compute_s == pytest.approx(costs.flops[block] / 1e7, rel=1e-6)
        assert part.required_memory_bytes == pytest.approx(costs.memory_bytes[block])
        names = PARTITION.update_names(*blocks)
        assert part.payload_bytes >= sum(np.prod(SHAPES[name]) for name in names)
        examples[list(blocks)] += part.batch_size
    trained = np.flatnonzero(examples)
    assert solved.brought.blocks == tuple(trained)
    assert solved.brought.batch_size == tuple(examples[trained])
    assert max(p.latency_s for p in parts) == pytest.approx(solved.allocation.round_s)


def test_who_cannot_or_had_better_not_sends_one_block():
    run, one = statement(**WIDE), {"trains_one_block": True}
    _, parts = solved_parts(run, even_fleet(3, **one))
    assert not any(part.further_blocks for part in parts)
    # Memory for the own block alone.
    devices = even_fleet(3, memory_bytes=float(COSTS.at(8).memory_bytes.max()))
    _, parts = solved_parts(run, devices)
    for part in parts:
        assert part.required_memory_bytes <= part.memory_bytes
    # It gave more than its part of the last block's updates.
    given = np.zeros((3, 3), np.int64)
    given[0] = [20, 20, 20]
    _, parts = solved_parts(run, even_fleet(3), given=given)
    often = [part for part in parts if part.device == even_fleet(3)[0].name]
    assert not any(part.further_blocks for part in often)
    assert any(part.further_blocks for part in parts)


def test_with_all_taking_part_all_do():
    run = statement(**WIDE, mode=RoundMode(participation="all"))
    _, parts = solved_parts(run, even_fleet(3), wanted=run.allocation.mode)
    assert len(parts) == 3
    assert max(part.batch_size for part in parts) <= max(GRID)


def test_a_device_in_a_fade_is_not_asked_though_others_gave_their_part():
    run, good = statement(**WIDE), even_fleet(2)
    faded = replace(even_fleet(3)[2], uplink_bps=1e3)
    given = np.array([[0, 0, 20], [0, 0, 20], [0, 0, 0]])
    asked = {}
    for usual_round_s in (None, 2.0):
        _, parts = solved_parts(
            run, [*good, faded], given=given, usual_round_s=usual_round_s, pace=0.0
        )
        asked[usual_round_s] = {part.device for part in parts}
    assert faded.name in asked[None]
    assert asked[2.0] == {device.name for device in good}
