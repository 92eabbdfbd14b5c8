"""The model's way down: how long it takes, and that it is part of a round."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import RoundMode
from lola_flwr.build import DownlinkChannel
from lola_flwr.errors import UserError
from lola_flwr.server.selection import Selection
from lola_flwr.system.channel import Channel, rates_down_bps
from lola_flwr.system.devices import DeviceProfile, simulated_device
from lola_flwr.system.own_channel import Moment
from lola_flwr.wire.payload import SizesDown
from tests.server.coordinators import PARTITION, SHAPES, honest_reply, make_coordinator

IDS = [f"id-{n}" for n in range(6)]
GAIN_DB = 3.0
NBYTES = {name: 4 * int(np.prod(SHAPES[name])) for name in PARTITION.trainable}
BITS = 8.0 * SizesDown(NBYTES, {}).message_bytes(None)


def cell(downlink_mode, **options):
    down = DownlinkChannel(mode=downlink_mode, bandwidth_hz=2e5, gain_db=GAIN_DB)
    return make_coordinator(num_devices=6, downlink_channel=down, **options)


def rates_bps(server_round=1, fading="rayleigh"):
    """Return each device's rate over the whole downlink, by its name."""
    profiles = [simulated_device(n, seed=1) for n in range(6)]
    down = DownlinkChannel(mode="broadcast", bandwidth_hz=2e5, gain_db=GAIN_DB)
    channel = Channel(downlink_channel=down, fading=fading)
    rates = rates_down_bps(profiles, channel, Moment(server_round, 0.0, 0))
    return {p.name: rate for p, rate in zip(profiles, rates, strict=True)}


def completed(coordinator, server_round=1, **changes):
    plan = coordinator.plan_round(server_round, IDS)
    replies = [honest_reply(plan, device, **changes) for device in plan.assignments]
    return plan, coordinator.complete_round(plan, replies)


def test_rates_follow_from_the_uplinks_snr_and_the_gain():
    profile = DeviceProfile("a", 1e9, 1e9, snr_db=7.0)
    linked = DeviceProfile("b", 1e9, 1e9, uplink_bps=5e6)
    down = DownlinkChannel(mode="unicast", bandwidth_hz=1e6, gain_db=3.0)
    channel = Channel(downlink_channel=down, fading="none")
    rates = rates_down_bps([profile, linked], channel, Moment(1, 0.0, 0))
    assert rates == pytest.approx([1e6 * np.log2(1 + 10.0), 5e6])
    # Both ways fade alike: a gain of 0 over the same band is the uplink.
    faded = rates_bps()
    assert faded != rates_bps(fading="none") and faded != rates_bps(server_round=2)


def test_a_broadcast_takes_as_long_as_the_worst_device_that_takes_part():
    plan, record = completed(cell("broadcast"))
    rates = rates_bps()
    worst_bps = min(rates[block.device] for block in record.blocks)
    assert {b.downlink_s for b in record.blocks} == {BITS / worst_bps}
    assert len(record.blocks) == 3
    assert record.round_s == pytest.approx(max(b.latency_s for b in record.blocks))
    assert record.bound_s == plan.allocation.round_s
    # Nobody who is worse than that could have made the round shorter.
    free = cell("free").plan_round(1, IDS).allocation.round_s
    assert (
        free + BITS / max(rates.values())
        < record.round_s
        <= free + BITS / min(rates.values())
    )


def test_each_device_has_a_part_of_the_band_by_unicast():
    plan, record = completed(cell("unicast"))
    rates = rates_bps()
    for block in record.blocks:
        assert block.downlink_s == pytest.approx(3 * BITS / rates[block.device])
    # Under best shares all end together, whenever they began.
    ends = [block.latency_s for block in record.blocks]
    assert ends == pytest.approx([plan.allocation.round_s] * 3)


@pytest.mark.parametrize("mode", ["broadcast", "unicast"])
def test_a_runs_time_is_the_sum_of_its_parts(mode):
    coordinator = cell(mode, server_s=0.125, correct_profiles=False)
    total_s = 0.0
    for server_round in (1, 2, 3):
        _, record = completed(coordinator, server_round)
        parts = json.loads(record.to_json())["blocks"]
        assert all(part["downlink_s"] > 0 for part in parts)
        total_s += 0.125 + max(
            p["downlink_s"] + p["reported_compute_s"] + p["upload_s"] for p in parts
        )
        assert record.wireless_s == pytest.approx(total_s)


def test_without_being_asked_for_it_takes_no_time():
    plain = make_coordinator(num_devices=6).plan_round(1, IDS)
    free = cell("free").plan_round(1, IDS)
    assert free.allocation.round_s == plain.allocation.round_s
    assert not free.solved.downlink_s.any()


@pytest.mark.parametrize("mode", ["broadcast", "unicast"])
def test_what_real_devices_took_counts_in_place_of_the_model(mode):
    coordinator = cell(mode)
    plan = coordinator.plan_round(1, IDS)
    replies = []
    for device in plan.assignments:
        reply = honest_reply(plan, device)
        report = {**reply.report, "compute-clock": "measured"}
        # 0.1 s of computation, 0.5 s of upload: 2 s until it began.
        replies.append(replace(reply, report=report, answered_s=2.6, upload_s=0.5))
    coordinator.complete_round(plan, replies)
    seen = {plan.profiles[device].name for device in plan.assignments}
    again = completed(coordinator, 2)[1]
    for block in again.blocks:
        modelled_s = BITS / rates_bps(2)[block.device]
        expected_s = modelled_s * (3 if mode == "unicast" else 1)
        if block.device in seen:
            assert block.downlink_s == pytest.approx(2.0)
        elif mode == "unicast":
            assert block.downlink_s == pytest.approx(expected_s)
        else:
            assert block.downlink_s >= expected_s * (1 - 1e-9)


def test_what_a_device_holds_is_not_sent_again():
    coordinator = cell("unicast", downlink="changed")
    plan = coordinator.plan_round(1, IDS)
    device, *_ = plan.assignments
    (block,) = plan.assignments[device].blocks
    reply = honest_reply(plan, device)
    held = plan.manifests[device].version
    reply = replace(reply, report={**reply.report, "held": held})
    # Its block and the head are all that changes.
    coordinator.complete_round(plan, [reply])
    record = completed(coordinator, 2)[1]
    parts = {part.device: part for part in record.blocks}
    name = plan.profiles[device].name
    changed = {n: NBYTES[n] for n in (*PARTITION.blocks[block], *PARTITION.head)}
    for part in parts.values():
        sent = changed if part.device == name else NBYTES
        bits = 8.0 * SizesDown(sent, {}).message_bytes(None)
        expected_s = 3 * bits / rates_bps(2)[part.device]
        assert part.downlink_s == pytest.approx(expected_s)
        assert part.sent_bytes == sum(sent.values())
    assert name in parts, "the test is about this device"


def holding(coordinator, server_round):
    """Complete a round whose devices say what they hold; return its plan."""
    plan = coordinator.plan_round(server_round, IDS)
    replies = []
    for device in plan.assignments:
        reply = honest_reply(plan, device)
        report = {**reply.report, "held": plan.manifests[device].version}
        replies.append(replace(reply, report=report))
    coordinator.complete_round(plan, replies)
    return plan


def test_idle_devices_hear_a_broadcast_if_they_hear_no_worse():
    # Drawn at random, devices that hear badly take part while others are idle.
    options = {"downlink": "changed", "downlink_codec": "int8"}
    coordinator = cell("broadcast", allocator="random", **options)
    overheard = 0
    for server_round in range(1, 13):
        known = dict(coordinator.state.held.of_device)
        plan = holding(coordinator, server_round)
        slowest_bps = min(
            rates_bps(server_round)[plan.profiles[device].name]
            for device in plan.assignments
        )
        most_bytes = max(
            sum(coordinator_bytes(coordinator, manifest))
            for manifest in plan.manifests.values()
        )
        now = coordinator.state.held
        for device in set(IDS) - set(plan.assignments):
            hears = rates_bps(server_round)[plan.profiles[device].name] >= slowest_bps
            lacks = plan.overheard.get(device)
            # Whoever was never asked has nothing that the change is from.
            assert (lacks is not None) <= (hears and device in known)
            if lacks is not None:
                overheard += 1
                assert sum(coordinator_bytes(coordinator, lacks)) <= most_bytes
                assert now.of_device[device] == tuple(p.digest for p in lacks.pieces)
            elif device in known:
                assert now.of_device[device] == known[device]
    assert overheard > 3


def coordinator_bytes(coordinator, manifest):
    sizes = SizesDown.of(coordinator.arrays(), "int8", by_name=False)
    return sizes.nbytes(manifest)


def test_who_is_sent_each_its_own_overhears_nothing():
    coordinator = cell("unicast", downlink="changed", downlink_codec="int8")
    for server_round in (1, 2, 3):
        assert not holding(coordinator, server_round).overheard


def test_a_device_whose_update_is_refused_still_holds_what_it_was_sent():
    coordinator = cell("broadcast", downlink="changed", norm_factor=3.0)
    for server_round in range(1, 4):
        holding(coordinator, server_round)
    plan = coordinator.plan_round(4, IDS)
    device, *others = plan.assignments
    replies = []
    for each in (device, *others):
        reply = honest_reply(plan, each, value=0.5 if each in others else 1e6)
        report = {**reply.report, "held": plan.manifests[each].version}
        replies.append(replace(reply, report=report))
    record = coordinator.complete_round(plan, replies)
    assert sum(record.refused.values()) == 1
    held = coordinator.state.held.of_device[device]
    assert held == tuple(p.digest for p in plan.manifests[device].pieces)


def test_a_device_that_would_hear_for_hours_is_not_asked():
    coordinator = cell("broadcast", longest_round_s=20.0)
    far = DeviceProfile("far", flops_per_s=1e15, memory_bytes=1e12, snr_db=-60.0)
    coordinator.add_device("id-far", far.to_properties())
    plan = coordinator.plan_round(1, [*IDS, "id-far"])
    assert "id-far" not in plan.assignments
    everyone = RoundMode(participation="all")
    coordinator = cell("broadcast", longest_round_s=20.0, mode=everyone)
    coordinator.add_device("id-far", far.to_properties())
    plan = coordinator.plan_round(1, [*IDS, "id-far"])
    assert plan.solved.num_excluded == 1 and "id-far" not in plan.assignments


@pytest.mark.parametrize("mode", ["broadcast", "unicast"])
def test_a_latency_target_holds_with_the_way_down(mode):
    whole_s = cell(mode).plan_round(1, IDS).allocation.round_s
    free_s = cell("free").plan_round(1, IDS).allocation.round_s
    target_s = 0.5 * (whole_s + free_s)
    assert free_s < target_s < whole_s
    selection = Selection(latency_target_s=target_s)
    plan = cell(mode, selection=selection).plan_round(1, IDS)
    assert 1 <= len(plan.assignments) < 3
    assert plan.allocation.round_s <= target_s * (1 + 1e-9)


@pytest.mark.parametrize("allocator", ["jbba", "crunch", "random"])
def test_other_allocators_wait_for_their_own_devices(allocator):
    record = completed(cell("broadcast", allocator=allocator))[1]
    rates = rates_bps()
    worst_bps = min(rates[block.device] for block in record.blocks)
    waits_s = [block.downlink_s for block in record.blocks]
    assert waits_s == pytest.approx([BITS / worst_bps] * 3)
    best_s = cell("broadcast").plan_round(1, IDS).allocation.round_s
    assert record.round_s >= best_s * (1 - 1e-9)


@pytest.mark.parametrize("mode", ["broadcast", "unicast"])
def test_fewer_devices_than_blocks_wait_too(mode):
    coordinator = cell(mode)
    plan = coordinator.plan_round(1, IDS[:2])
    assert sum(len(a.blocks) for a in plan.assignments.values()) == 3
    rates = rates_bps()
    names = {device: plan.profiles[device].name for device in plan.assignments}
    if mode == "broadcast":
        worst_bps = min(rates[name] for name in names.values())
        assert plan.solved.downlink_s.tolist() == [BITS / worst_bps] * 2
    else:
        expected = [2 * BITS / rates[names[device]] for device in plan.device_ids]
        assert plan.solved.downlink_s == pytest.approx(expected)
    # The cut was chosen without it: nothing more is claimed.
    assert plan.allocation.bound_s < plan.allocation.round_s


def test_backups_and_shared_blocks_are_among_those_who_hear():
    for options in (
        {"mode": RoundMode(backups=2)},
        {"sharing_eps": 1.0},
        {"rotation_eps": 0.5},
    ):
        coordinator = cell("broadcast", **options)
        record = completed(coordinator)[1]
        rates = rates_bps()
        worst_bps = min(rates[block.device] for block in record.blocks)
        waits_s = {block.downlink_s for block in record.blocks}
        assert len(waits_s) == 1
        assert waits_s.pop() >= BITS / worst_bps * (1 - 1e-9)


def test_impossible_channels_are_refused():
    with pytest.raises(UserError, match="'multicast' of the downlink must be one of"):
        DownlinkChannel(mode="multicast")
    with pytest.raises(UserError, match="bandwidth_hz=0"):
        DownlinkChannel(bandwidth_hz=0.0)
    with pytest.raises(UserError, match="gain_db=nan"):
        DownlinkChannel(gain_db=float("nan"))
