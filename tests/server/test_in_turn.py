"""Devices that send one after the other, from the plan to the records."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import RoundMode
from lola_flwr.build import AllocationOptions, Channel, RoundSettings
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.errors import UserError
from lola_flwr.planning import Known, RunStatement, plan_rounds, solve_round
from lola_flwr.server.selection import Selection
from lola_flwr.system.channel import DownlinkChannel, full_band_rate_bps
from lola_flwr.system.devices import InvalidProfile, simulated_device
from lola_flwr.wire.records import UpdateReport
from tests.server.coordinators import PARTITION, SHAPES, honest_reply, make_coordinator
from tests.server.test_power_limited import snr_of

BANDWIDTH_HZ = 2e4
IN_TURN = {"uplink": "tdma", "bandwidth_hz": BANDWIDTH_HZ}
IDS = [f"id-{n}" for n in range(9)]


def last_s(parts):
    """When the last has sent, one after the other as they have computed."""
    free_s = 0.0
    for ready_s, upload_s in sorted(parts):
        free_s = max(free_s, ready_s) + upload_s
    return free_s


def uploads_are_in_turn(record, **drawn):
    """Nobody sends while another does, nor before it has computed."""
    ends_s = []
    for part in record.blocks:
        bits = 8 * part.payload_bytes
        rate_bps = full_band_rate_bps(BANDWIDTH_HZ, snr_of(part.device, **drawn))
        assert part.upload_s == pytest.approx(bits / rate_bps)
        assert part.share == pytest.approx(part.upload_s / record.round_s)
        ends_s.append((part.latency_s, part.latency_s - part.upload_s))
    for (end_s, _), (_, next_s) in itertools.pairwise(sorted(ends_s)):
        assert next_s >= end_s - 1e-9
    ready = [(p.downlink_s + p.compute_s, p.upload_s) for p in record.blocks]
    assert record.round_s == pytest.approx(last_s(ready))
    assert record.round_s == pytest.approx(max(p.latency_s for p in record.blocks))


def completed(coordinator, server_round=1, reply=honest_reply):
    plan = coordinator.plan_round(server_round, IDS)
    replies = [reply(plan, device) for device in plan.assignments]
    return plan, coordinator.complete_round(plan, replies)


@pytest.mark.parametrize("seed", range(8))
def test_a_round_is_the_shortest_of_all_matchings(seed):
    coordinator = make_coordinator(num_devices=3 + seed % 3, seed=seed, **IN_TURN)
    plan, record = completed(coordinator)
    uploads_are_in_turn(record, seed=seed)
    compute_s, upload_s = plan.problem.compute_s, plan.problem.full_band_upload_s
    shortest_s = min(
        last_s([(compute_s[k, n], upload_s[k, n]) for n, k in enumerate(devices)])
        for devices in itertools.permutations(range(len(compute_s)), 3)
    )
    assert record.round_s == pytest.approx(shortest_s, rel=3e-6)
    assert record.bound_s == pytest.approx(shortest_s, rel=3e-6)
    assert max(plan.planned_s.values()) == pytest.approx(record.round_s)
    shared = make_coordinator(
        num_devices=3 + seed % 3, seed=seed, bandwidth_hz=BANDWIDTH_HZ
    )
    assert record.round_s <= completed(shared)[1].round_s


@pytest.mark.parametrize(
    "options",
    [
        {"downlink_channel": DownlinkChannel(mode="unicast")},
        {"num_devices": 2},
        {"mode": RoundMode(participation="all"), "num_devices": 6},
        {"mode": RoundMode(backups=1), "num_devices": 5},
        {"allocator": "greedy"},
        {"allocator": "random"},
    ],
)
def test_whatever_a_round_is_asked_for_devices_take_turns(options):
    coordinator = make_coordinator(**{"num_devices": 4, **IN_TURN, **options})
    for server_round in (1, 2):
        _, record = completed(coordinator, server_round)
        uploads_are_in_turn(record, server_round=server_round)
    if options.get("num_devices") == 2:
        assert any(part.further_blocks for part in record.blocks)
        assert np.isnan(record.bound_s), "other cuts of the model were not ruled out"


def test_what_is_observed_is_when_the_last_had_sent():
    """Who computes longer than planned comes later, and whoever is ready goes ahead."""
    took_s = {}

    def reply(plan, device):
        block = plan.assignments[device].block_index
        took_s[block] = 2.0 - 0.01 * block
        report = UpdateReport(
            server_round=1,
            block_index=block,
            update_kind="gradient",
            loss=0.7,
            compute_s=took_s[block],
            compute_clock="simulated",
        )
        return honest_reply(plan, device, report=report.to_record())

    _, record = completed(make_coordinator(num_devices=4, **IN_TURN), reply=reply)
    seen = [(took_s[part.block_index], part.upload_s) for part in record.blocks]
    assert record.observed_s == pytest.approx(last_s(seen))
    assert record.observed_s > max(map(sum, seen)) * 1.1


def test_sending_takes_energy_and_waiting_for_a_turn_does_not():
    costs = estimate_costs(SHAPES, PARTITION, batch_size=8, sequence_length=4)
    devices = [
        replace(simulated_device(n, seed=1), compute_power_w=5.0, transmit_power_w=2.0)
        for n in range(4)
    ]
    run = RunStatement(costs=costs, channel=Channel(**IN_TURN))
    solved = solve_round(run, Known.at_first(run, devices))
    joules = solved.allocation.joules(solved.problem)
    for row, block in solved.active():
        sent_j = 2.0 * solved.problem.full_band_upload_s[row, block]
        computed_j = 5.0 * solved.problem.compute_s[row, block]
        assert joules[row] == pytest.approx(sent_j + computed_j)


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": AllocationOptions(allocator="jbba")},
        {"allocation": AllocationOptions(allocator="energy-worst")},
        {"allocation": AllocationOptions(rotation_eps=0.1)},
        {"allocation": AllocationOptions(sharing_eps=0.1)},
        {"allocation": AllocationOptions(batch_sizes=(8, 16))},
        {"channel": Channel(downlink_channel=DownlinkChannel(mode="broadcast"))},
    ],
)
def test_what_divides_the_band_is_refused(options):
    channel = replace(options.pop("channel", Channel()), uplink="tdma")
    with pytest.raises(UserError, match=r"share the band.*leave it out"):
        RoundSettings(channel=channel, **options)


@pytest.mark.parametrize(
    "options",
    [{"codec": "auto"}, {"selection": Selection(latency_target_s=5.0)}],
)
def test_what_chooses_by_shares_is_refused(options):
    with pytest.raises(UserError, match="under uplink='tdma' they send in turn"):
        make_coordinator(**IN_TURN, **options)


def test_links_that_are_real_wait_for_no_turn():
    linked = replace(simulated_device(4, seed=1), uplink_bps=1e6)
    with pytest.raises(InvalidProfile, match="devices take turns, which nothing makes"):
        make_coordinator(**IN_TURN).add_device("id-4", linked.to_properties())


def test_rates_of_ones_own_can_be_had_in_turn():
    rates = Channel(uplink="tdma", own_rates=lambda profiles, _: [1e5] * len(profiles))
    costs = estimate_costs(SHAPES, PARTITION, batch_size=8, sequence_length=4)
    devices = [simulated_device(n, seed=1) for n in range(3)]
    run = RunStatement(costs=costs, channel=rates)
    solved = solve_round(run, Known.at_first(run, devices))
    sent_s = costs.payload_bits.sum() / 1e5
    assert solved.allocation.round_s >= sent_s
    uniform = plan_rounds(devices, costs, rounds=1)
    assert uniform[0].blocks[0].turn_s == 0.0
