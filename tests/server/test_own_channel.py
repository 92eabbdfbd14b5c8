"""Runs on a channel of one's own are planned as on any other."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest

from lola_flwr.system.devices import simulated_device
from lola_flwr.system.mobility import Mobility
from lola_flwr.system.own_channel import find_channel
from tests.server.coordinators import honest_reply, make_coordinator

IDS = [f"id-{n}" for n in range(5)]
MBIT_S = (3.5, 0.7, 12.125, 1.1, 6.6)


def rounds_of(coordinator):
    records = []
    for server_round in (1, 2, 3):
        plan = coordinator.plan_round(server_round, IDS)
        replies = [honest_reply(plan, device) for device in plan.assignments]
        records.append(asdict(coordinator.complete_round(plan, replies)))
    return records


@pytest.mark.parametrize("samples", [1, 3])
def test_a_constant_trace_is_the_plan_of_known_rates_bit_for_bit(tmp_path, samples):
    known = make_coordinator(num_devices=0)
    lines = ["time_s,device,mbit_s"]
    for number, (device, rate) in enumerate(zip(IDS, MBIT_S, strict=True)):
        profile = simulated_device(number, seed=1)
        linked = replace(profile, uplink_bps=1e6 * rate)
        known.add_device(device, linked.to_properties())
        lines += [f"{0.01 * n},{profile.name},{rate}" for n in range(samples)]
    path = tmp_path / "links.csv"
    path.write_text("\n".join(lines))
    replay = find_channel(str(path))
    traced = make_coordinator(num_devices=5, own_rates=replay)
    assert rounds_of(traced) == rounds_of(known)


def test_each_round_is_planned_at_its_own_time():
    asked = []

    def rates(profiles, moment):
        asked.append(moment)
        return [1e6] * len(profiles)

    records = rounds_of(make_coordinator(num_devices=5, own_rates=rates))
    assert [moment.server_round for moment in asked] == [1, 2, 3]
    before = [0.0, *(record["wireless_s"] for record in records[:-1])]
    assert [moment.time_s for moment in asked] == before


def test_a_run_that_goes_on_finds_the_channel_as_it_was():
    channel = {"fading": "gauss-markov", "coherence_s": 0.5, "mobility": Mobility()}
    make = partial(make_coordinator, num_devices=5, bandwidth_hz=1e4, **channel)

    def completed(coordinator, server_round):
        plan = coordinator.plan_round(server_round, IDS)
        replies = [honest_reply(plan, device) for device in plan.assignments]
        return asdict(coordinator.complete_round(plan, replies))

    unbroken, stopped, resumed = make(), make(), make()
    records = [completed(unbroken, server_round) for server_round in (1, 2, 3)]
    completed(stopped, 1)
    snapshot = stopped.snapshot()
    arrays = {name: np.array(values) for name, values in snapshot.arrays.items()}
    resumed.restore(type(snapshot)(arrays, snapshot.values))
    for device in range(5):
        profile = simulated_device(device, seed=1)
        resumed.add_device(f"id-{device}", profile.to_properties())
    assert [completed(resumed, server_round) for server_round in (2, 3)] == records[1:]
    # And rounds do differ, by more than who is asked.
    assert len({record["round_s"] for record in records}) == 3
