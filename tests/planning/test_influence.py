"""No device gives more than its part of a block while others can, whatever it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lola_flwr.planning import (
    AllocationOptions,
    Known,
    RunStatement,
    named_model_costs,
    solve_round,
)
from lola_flwr.planning.candidates import WINDOW
from lola_flwr.server.influence import Influence
from lola_flwr.system.devices import simulated_device

ROUNDS = 30


def liar(device):
    return replace(device, flops_per_s=1e15, snr_db=60.0, memory_bytes=1e12)


def givers(fleet, **options):
    """Return who gave each block's updates, round by round: names [rounds, N]."""
    run = RunStatement(
        costs=named_model_costs("minilm-l6"), allocation=AllocationOptions(**options)
    )
    names = [device.name for device in fleet]
    influence, rounds = Influence(), []
    for server_round in range(1, ROUNDS + 1):
        known = replace(
            Known.at_first(run, fleet, server_round),
            given=influence.given(names, run.num_blocks),
        )
        pairs = sorted((b, names[row]) for row, b in solve_round(run, known).active())
        influence = influence.after(pairs)
        rounds.append([name for _, name in pairs])
    return np.array(rounds)


def fleet_of(count, memory_bytes):
    """Return devices with this memory, of which the fourth is a liar."""
    fleet = [
        replace(simulated_device(n, seed=0), memory_bytes=memory_bytes)
        for n in range(count)
    ]
    return [*fleet[:3], liar(fleet[3]), *fleet[4:]]


def test_who_claims_to_be_fastest_is_asked_for_its_part():
    fleet = fleet_of(15, 1e12)
    # Twice the even part of 20 updates of a block is 2.
    bounded = (givers(fleet) == fleet[3].name)[-WINDOW:]
    assert bounded.sum(axis=0).max() <= 2
    free = (givers(fleet, influence_factor=np.inf) == fleet[3].name)[-WINDOW:]
    assert free.sum() == WINDOW
    assert free.sum(axis=0).max() > 4


def test_a_fleet_that_is_asked_alike_is_not_bound():
    fleet = fleet_of(6, 1e12)
    free = givers(fleet, influence_factor=np.inf)
    np.testing.assert_array_equal(givers(fleet), free)


def test_who_alone_has_the_memory_for_a_block_is_asked_on():
    first, second = named_model_costs("minilm-l6").memory_bytes[:2]
    fleet = fleet_of(15, (first + second) / 2)
    found = givers(fleet)
    assert set(found[:, 0]) == {fleet[3].name}
    assert len(set(found[:, 1])) > 5
