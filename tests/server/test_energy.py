"""Joules of a run: of devices, of rounds, and in all."""

import json
from dataclasses import replace

import pytest

from lola_flwr.allocation import RoundMode
from lola_flwr.errors import UserError
from lola_flwr.report.tally import Tally
from lola_flwr.run.target import Target, reached
from lola_flwr.server.state import RunState
from lola_flwr.system.channel import DownlinkChannel
from lola_flwr.system.devices import FleetRanges, simulated_device
from tests.server.coordinators import honest_reply, make_coordinator

NAMES = [f"id-{index}" for index in range(6)]
RANGES = FleetRanges().with_powers()


def with_powers(num_devices=6, ranges=RANGES, **options):
    """A coordinator whose devices say what they draw."""
    coordinator = make_coordinator(num_devices=0, **options)
    for index in range(num_devices):
        profile = simulated_device(index, seed=1, ranges=ranges)
        coordinator.add_device(f"id-{index}", profile.to_properties())
    return coordinator


def round_of(coordinator, server_round, changes=None, lost=0):
    plan = coordinator.plan_round(server_round, NAMES)
    replies = [
        honest_reply(plan, device, **(changes or {}))
        for device in list(plan.assignments)[lost:]
    ]
    return coordinator.complete_round(plan, replies)


def planned(coordinator):
    """The record of a round that nobody answered in."""
    return coordinator.complete_round(coordinator.plan_round(1, NAMES), [])


def profiles_of(coordinator):
    return {p.name: p for p in coordinator.state.fleet.profiles.values()}


def test_joules_of_a_run_add_up():
    coordinator = with_powers()
    records = [
        round_of(coordinator, 1),
        coordinator.skip_round(2, "nobody is there"),
        round_of(coordinator, 3, {"upload_s": 0.25}),  # measured
        round_of(coordinator, 4, lost=1),
    ]
    profiles, total_j = profiles_of(coordinator), 0.0
    for record in records:
        for part in record.blocks:
            compute_s, upload_s = part.reported_compute_s, part.measured_upload_s
            compute_s = part.compute_s if compute_s is None else compute_s
            upload_s = part.upload_s if upload_s is None else upload_s
            profile = profiles[part.device]
            assert part.joules == pytest.approx(
                profile.compute_power_w * compute_s
                + profile.transmit_power_w * upload_s
            )
            total_j += part.joules
        assert record.joules == pytest.approx(total_j)
    assert {part.status for part in records[-1].blocks} == {"accepted", "no reply"}
    assert f"joules={total_j:.3f}" in records[-1].final_line()
    lines = records[-1].lines()
    assert f"{records[-1].round_j:.3f} J, {total_j:.3f} J so far; " in lines[0]
    assert f"s, {records[-1].blocks[0].joules:.3f} J" in lines[1]
    # So does what a target cost.
    records[-1] = replace(records[-1], metrics={"accuracy": 0.9})
    course = Tally.of(records).course("accuracy")
    spent = reached(course, Target("accuracy", 0.9))
    assert spent.joules == pytest.approx(total_j)


def test_what_sensors_measured_goes_before_the_model():
    coordinator = with_powers()
    plan = coordinator.plan_round(1, NAMES)
    replies = [honest_reply(plan, device) for device in plan.assignments]
    report = {**replies[0].report, "compute-j": 7.5}
    replies[0] = replace(replies[0], report=report)
    record = coordinator.complete_round(plan, replies)
    measured = plan.profiles[replies[0].device_id]
    (part,) = [p for p in record.blocks if p.device == measured.name]
    assert part.measured_compute_j == 7.5
    assert part.joules == pytest.approx(7.5 + measured.transmit_power_w * part.upload_s)


@pytest.mark.parametrize("unsaid", ["compute_power_w", "transmit_power_w"])
def test_where_a_device_does_not_say_nothing_is_claimed(unsaid):
    coordinator = with_powers(ranges=replace(RANGES, **{unsaid: None}))
    record = round_of(coordinator, 1)
    assert {part.joules for part in record.blocks} == {None}
    assert record.joules is record.round_j is None
    assert " J" not in "".join(record.lines())
    assert "joules" not in record.final_line()
    assert "joules" not in record.figures()
    # Nor of any round after one of which it is not known.
    assert coordinator.skip_round(2, "nobody is there").joules is None


def test_the_state_keeps_what_a_run_took():
    coordinator = with_powers()
    joules = round_of(coordinator, 1).joules
    values = json.loads(json.dumps(coordinator.state.to_values()))
    assert RunState.from_values(values).joules == joules
    # Of a run that an earlier version began it is not known.
    del values["joules"]
    assert RunState.from_values(values).joules is None


@pytest.mark.parametrize("downlink", ["free", "broadcast", "unicast"])
@pytest.mark.parametrize("allocator", ["energy", "energy-worst"])
def test_a_run_saves_energy_within_the_slack(allocator, downlink):
    channel = DownlinkChannel(mode=downlink, bandwidth_hz=1e4)
    options = {"downlink_channel": channel, "bandwidth_hz": 1e4}
    least = planned(with_powers(**options))
    coordinator = with_powers(allocator=allocator, energy_slack=0.5, **options)
    saving = planned(coordinator)
    assert saving.round_s <= 1.5 * least.round_s * (1 + 1e-9)
    assert saving.bound_s <= saving.round_s
    worth = sum if allocator == "energy" else max
    now_j, least_j = (
        worth(part.joules for part in record.blocks) for record in (saving, least)
    )
    assert now_j < least_j * (1 - 1e-3)


def test_a_latency_target_is_kept():
    best_s = round_of(with_powers(), 1).round_s
    target_s = 1.05 * best_s
    coordinator = with_powers(
        allocator="energy", energy_slack=2.0, latency_target_s=target_s
    )
    assert round_of(coordinator, 1).round_s <= target_s * (1 + 1e-9)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"batch_sizes": (8, 16)},
            "batch_sizes does not go with allocator='energy'",
        ),
        ({"rotation_eps": 0.1}, "rotation_eps does not go with allocator='energy'"),
        ({"sharing_eps": 0.1}, "sharing_eps does not go with allocator='energy'"),
        ({"energy_slack": -1.0}, "energy_slack=-1.0 must be at least 0"),
        ({"codec": "auto"}, "A codec out of int8, bf16, fp32 for each device does"),
    ],
)
def test_what_would_change_the_shares_is_refused(options, says):
    with pytest.raises(UserError, match=says):
        with_powers(allocator="energy", **options).plan_round(1, NAMES)


def test_devices_that_do_not_say_are_named():
    coordinator = make_coordinator(num_devices=4, allocator="energy")
    with pytest.raises(UserError, match="do not say: device-0000, device-0001, dev"):
        coordinator.plan_round(1, NAMES[:4])


@pytest.mark.parametrize(
    ("num_devices", "options"),
    [
        (2, {}),  # fewer than blocks: one trains several
        (5, {"mode": RoundMode(participation="all")}),
        (6, {"mode": RoundMode(devices_per_block=2)}),
    ],
)
def test_energy_is_saved_whoever_takes_part(num_devices, options):
    names = NAMES[:num_devices]
    best = with_powers(num_devices, **options).plan_round(1, names)
    coordinator = with_powers(num_devices, allocator="energy", **options)
    plan = coordinator.plan_round(1, names)
    record = coordinator.complete_round(plan, [])
    assert plan.allocation.round_s <= 1.1 * best.allocation.round_s * (1 + 1e-9)
    assert record.round_j == pytest.approx(plan.allocation.joules(plan.problem).sum())
    assert record.round_j <= best.allocation.joules(best.problem).sum() * (1 + 1e-9)
