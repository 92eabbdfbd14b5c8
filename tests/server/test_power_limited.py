"""Devices that put their whole power on their share, from the plan to the records."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.build import AllocationOptions, Channel, RoundMode, RoundSettings
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.errors import UserError
from lola_flwr.planning import Known, RunStatement, solve_round
from lola_flwr.randomness import rng_for
from lola_flwr.server.selection import Selection
from lola_flwr.system.channel import DownlinkChannel
from lola_flwr.system.devices import InvalidProfile, simulated_device
from tests.allocation.allocation_oracle import least_share
from tests.planning.test_batches import fleet, known, statement
from tests.server.coordinators import PARTITION, SHAPES, honest_reply, make_coordinator

BANDWIDTH_HZ = 2e4
LIMITED = {"uplink": "power-limited", "bandwidth_hz": BANDWIDTH_HZ}


def snr_of(name, *, server_round=1, seed=0):
    """SNR of a device's whole band: its mean, and Rayleigh fading."""
    number = int(name.removeprefix("device-"))
    gain = rng_for(seed, "fading", server_round, name).exponential()
    return 10 ** (simulated_device(number, seed=1).snr_db / 10) * gain


def shannon_bps(share, snr):
    """Rate of a share of the band that has all of a device's power."""
    return share * BANDWIDTH_HZ * np.log2(1 + snr / share)


def uploads_are_shannons(record, **drawn):
    """Every part of a round takes as long as its bits do at its share."""
    assert sum(part.share for part in record.blocks) <= 1
    for part in record.blocks:
        rate_bps = shannon_bps(part.share, snr_of(part.device, **drawn))
        expected = pytest.approx(8 * part.payload_bytes / rate_bps, rel=1e-9)
        assert part.upload_s == expected
    assert record.round_s == pytest.approx(max(p.latency_s for p in record.blocks))


def completed(coordinator, server_round=1):
    ids = [f"id-{n}" for n in range(9)]
    plan = coordinator.plan_round(server_round, ids)
    replies = [honest_reply(plan, device) for device in plan.assignments]
    return plan, coordinator.complete_round(plan, replies)


def least_round_s(compute_s, payload_bits, snr):
    """Least latency over all matchings, by bisection on the sum of the shares."""
    devices = np.array([*itertools.permutations(range(len(snr)), payload_bits.size)])
    c = compute_s[devices, np.arange(payload_bits.size)]
    own = snr[devices]
    tau = payload_bits / shannon_bps(1.0, own)
    low, high = c.max(axis=1), c.max(axis=1) + tau.sum(axis=1)
    for _ in range(60):
        middle = 0.5 * (low + high)
        fits = least_share(tau, middle[:, None] - c, own).sum(axis=1) <= 1
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return high.min()


@pytest.mark.parametrize("seed", range(12))
def test_a_round_is_the_shortest_that_shannon_allows(seed):
    coordinator = make_coordinator(num_devices=3 + seed % 3, seed=seed, **LIMITED)
    plan, record = completed(coordinator)
    uploads_are_shannons(record, seed=seed)
    names = [profile.name for profile in plan.solved.stated.profiles]
    bits = np.array([8.0 * part.payload_bytes for part in record.blocks])
    snr = np.array([snr_of(name, seed=seed) for name in names])
    shortest_s = least_round_s(plan.problem.compute_s, bits, snr)
    assert record.round_s == pytest.approx(shortest_s, rel=1e-9)
    assert record.bound_s == record.round_s
    # And no device waits longer for its upload than the server expects.
    assert max(plan.planned_s.values()) == pytest.approx(record.round_s)


OPTIONS = {
    "codec": {"codec": "auto"},
    "rotation": {"rotation_eps": 0.5},
    "sharing": {"sharing_eps": 1.0, "num_devices": 6},
    "backups": {"mode": RoundMode(backups=2), "num_devices": 6},
    "all": {"mode": RoundMode(participation="all"), "num_devices": 5},
    "few devices": {"num_devices": 2},
    "target": {"selection": Selection(latency_target_s=0.6), "num_devices": 3},
    "broadcast": {"downlink_channel": DownlinkChannel(mode="broadcast")},
    "crunch": {"allocator": "crunch+shares"},
    "greedy": {"allocator": "greedy"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_whatever_a_round_is_asked_for_its_uploads_are_shannons(name):
    coordinator = make_coordinator(**{"num_devices": 4, **LIMITED, **OPTIONS[name]})
    for server_round in (1, 2, 3):
        _, record = completed(coordinator, server_round)
        uploads_are_shannons(record, server_round=server_round)
    if name == "few devices":
        assert any(part.further_blocks for part in record.blocks)
    if name == "target":
        assert record.round_s <= 0.6 * (1 + 1e-6)
    if name == "sharing":
        assert len(record.blocks) > 3


@pytest.mark.parametrize("seed", [0, 1, 26, 120, 123])
def test_fewer_devices_than_blocks_cut_the_model_best(seed):
    """With some of these the best cut under uniform power is another."""
    costs = estimate_costs(SHAPES, PARTITION, batch_size=8, sequence_length=4)
    speeds = 10 ** np.random.default_rng(seed).uniform(5, 6, 2)
    devices = [
        replace(simulated_device(number, seed=1), flops_per_s=flops_per_s)
        for number, flops_per_s in enumerate(speeds, start=seed % 9)
    ]
    run = RunStatement(costs=costs, channel=Channel(**LIMITED), seed=seed)
    solved = solve_round(run, Known.at_first(run, devices))
    snr = np.array([snr_of(device.name, seed=seed) for device in devices])
    speed = np.array([device.flops_per_s for device in devices])
    found = []
    for cut in ([[0], [1, 2]], [[0, 1], [2]]):
        joined, firsts = costs.joined(cut), [span[0] for span in cut]
        compute_s = joined.required_flops(devices)[:, firsts] / speed[:, None]
        found.append(least_round_s(compute_s, joined.payload_bits[firsts], snr))
    assert solved.allocation.round_s == pytest.approx(min(found), rel=1e-9)
    assert solved.allocation.bound_s == pytest.approx(min(found), rel=1e-9)


def test_its_rounds_are_never_longer_than_with_uniform_power():
    """A narrow band with all of the power carries more than its part of the whole."""
    longer = make_coordinator(num_devices=4, bandwidth_hz=BANDWIDTH_HZ)
    limited = make_coordinator(num_devices=4, **LIMITED)
    seconds = [completed(made)[1].round_s for made in (limited, longer)]
    assert seconds[0] < 0.95 * seconds[1]


def test_a_common_batch_is_kept_where_batches_are_chosen():
    run, devices = statement(), fleet(4)
    run = replace(run, channel=replace(run.channel, uplink="power-limited"))
    solved = solve_round(run, known(run, devices))
    assert len({size for size in solved.batch_size if size}) == 1
    assert solved.problem.power_limited is not None
    solved.allocation.check(solved.problem)


def test_a_link_of_known_rate_is_left_out():
    coordinator = make_coordinator(num_devices=4, **LIMITED)
    linked = replace(simulated_device(4, seed=1), uplink_bps=1e9)
    with pytest.raises(InvalidProfile, match=r"uplink_bps=1e\+09 of device 'device-00"):
        coordinator.add_device("id-4", linked.to_properties())
    _, record = completed(coordinator)
    assert record.num_devices == 4
    # And in a plan it is an error, not a device less.
    run = RunStatement(costs=statement().costs, channel=Channel(**LIMITED))
    with pytest.raises(InvalidProfile, match="state snr_db alone, or use uplink='ofdm"):
        solve_round(run, Known.at_first(run, [linked]))


@pytest.mark.parametrize("allocator", ["jbba", "energy"])
def test_allocators_that_take_power_to_be_uniform_are_refused(allocator):
    options = {
        "channel": Channel(**LIMITED),
        "allocation": AllocationOptions(allocator=allocator),
    }
    said = f"allocator={allocator!r} takes devices to send with uniform power"
    with pytest.raises(UserError, match=said):
        RoundSettings(**options)
    with pytest.raises(UserError, match=said):
        RunStatement(costs=statement().costs, **options)
