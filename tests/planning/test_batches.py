"""Batches and codec of a round, chosen for the least time to a target."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import RoundMode, progress
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.planning import (
    AllocationOptions,
    Known,
    RunStatement,
    planned_blocks,
    solve_round,
)
from lola_flwr.run.records import BlockRecord
from lola_flwr.system.channel import Channel, DownlinkChannel
from lola_flwr.system.devices import DeviceProfile, simulated_device
from lola_flwr.wire.payload import UpdateSizes
from tests.server.coordinators import PARTITION, SHAPES, honest_reply, make_coordinator

GRID = (8, 16, 32, 64, 128)
TOKENS = 64
COSTS = estimate_costs(SHAPES, PARTITION, batch_size=max(GRID), sequence_length=TOKENS)
NOISE = np.array([20.0, 100.0, 400.0])
# Where it differs much, the noisiest block of a round with small batches is left out.
EVEN_NOISE = np.full(3, 50.0)


def fleet(count: int, **fields) -> list[DeviceProfile]:
    """Devices for which a batch of these tiny blocks takes some tenths of a second."""
    return [
        replace(
            simulated_device(index, seed=3),
            **{"flops_per_s": 3e6 * 2**index, "num_examples": 1000, **fields},
        )
        for index in range(count)
    ]


def even_fleet(count: int, **fields) -> list[DeviceProfile]:
    """Devices of which none keeps the others waiting."""
    fields = {"flops_per_s": 1e7, "uplink_bps": 1e5, **fields}
    return fleet(count, **fields)


def statement(
    codec: str = "int8", bandwidth_hz: float = 2e4, **options
) -> RunStatement:
    return RunStatement(
        costs=COSTS,
        sizes=UpdateSizes(PARTITION, SHAPES, codec, "every"),
        channel=Channel(bandwidth_hz=bandwidth_hz),
        allocation=AllocationOptions(
            **{"batch_sizes": GRID, "further_blocks": False, **options}
        ),
    )


def known(run: RunStatement, devices: list[DeviceProfile], noise=NOISE) -> Known:
    return replace(Known.at_first(run, devices), noise_scale=noise)


def rate_of(
    parts: tuple[BlockRecord, ...], batch_sizes: list[int], noise=NOISE
) -> float:
    """Progress a second, from a plan's records alone."""
    blocks = [part.block_index for part in parts]
    brought = progress(np.array(batch_sizes), noise[blocks]).sum() / noise.size
    return float(brought / max(part.latency_s for part in parts))


def common_rates(
    run: RunStatement, devices: list[DeviceProfile], noise=NOISE
) -> list[float]:
    rates = []
    for size in GRID:
        options = replace(run.allocation, batch_sizes=())
        at = replace(run, costs=run.costs.at(size), allocation=options)
        parts = planned_blocks(at, solve_round(at, known(at, devices, noise)))
        rates.append(rate_of(parts, [size] * len(parts), noise))
    return rates


@pytest.mark.parametrize("bandwidth_hz", [2e3, 2e4, 2e6])
def test_own_batches_bring_more_a_second_than_any_common_one(bandwidth_hz):
    run, devices = statement(bandwidth_hz=bandwidth_hz), fleet(4)
    parts = planned_blocks(run, solve_round(run, known(run, devices)))
    assert len(parts) >= 2  # half of the blocks, at least
    own = rate_of(parts, [part.batch_size for part in parts])
    assert own >= max(common_rates(run, devices)) * (1 - 1e-9)
    assert len({part.batch_size for part in parts}) > 1
    for part in parts:
        device = next(d for d in devices if d.name == part.device)
        flops = COSTS.at(part.batch_size).flops[part.block_index]
        assert part.compute_s == pytest.approx(flops / device.flops_per_s)
        assert part.noise_scale == NOISE[part.block_index]


def test_the_matching_is_that_of_the_best_common_batch():
    run, devices = statement(), even_fleet(4)
    rates = dict(zip(GRID, common_rates(run, devices, EVEN_NOISE), strict=True))
    best = max(rates, key=lambda size: rates[size])
    at = replace(
        run,
        costs=run.costs.at(best),
        allocation=replace(run.allocation, batch_sizes=()),
    )
    np.testing.assert_array_equal(
        solve_round(run, known(run, devices, EVEN_NOISE)).allocation.block_of_device,
        solve_round(at, known(at, devices, EVEN_NOISE)).allocation.block_of_device,
    )


def test_nobody_is_asked_for_more_than_memory_and_data_hold():
    run = statement(bandwidth_hz=2e3)
    memory_bytes = float(COSTS.at(32).memory_bytes.max())
    for fields, most in (
        ({"num_examples": 11}, 11),
        ({"num_examples": None}, 32),
        ({"memory_bytes": max(memory_bytes, 1e5)}, None),
    ):
        devices = fleet(4, **fields)
        solved = solve_round(run, known(run, devices))
        for part in planned_blocks(run, solved):
            assert 1 <= part.batch_size <= (most or max(GRID))
            required = COSTS.at(part.batch_size).memory_bytes[part.block_index]
            assert part.required_memory_bytes == pytest.approx(required)
            assert required <= part.memory_bytes


@pytest.mark.parametrize("latency_target_s", [math.inf, 1e3])
@pytest.mark.parametrize("bandwidth_hz", [2e3, 2e6])
def test_who_has_programs_is_asked_for_their_batch(latency_target_s, bandwidth_hz):
    """They take as long for fewer examples, and refuse more."""
    own = {"d0": (12, 12, 1000), "d1": (48, 30, 30), "d2": (600, 128, None)}
    devices = [
        replace(
            device,
            name=name,
            trains_one_block=True,
            batch_size=own[name][0],
            num_examples=own[name][2],
        )
        for name, device in zip(own, even_fleet(3), strict=True)
    ]
    run = replace(
        statement(bandwidth_hz=bandwidth_hz), latency_target_s=latency_target_s
    )
    parts = planned_blocks(run, solve_round(run, known(run, devices, EVEN_NOISE)))
    assert len(parts) >= 2
    for part in parts:
        size, asked, _ = own[part.device]
        costs, block = COSTS.at(min(size, max(GRID))), part.block_index
        assert part.batch_size == asked
        assert part.compute_s == pytest.approx(costs.flops[block] / 1e7)
        assert part.required_memory_bytes == costs.memory_bytes[block]


@pytest.mark.parametrize("bandwidth_hz", [2e3, 2e4, 2e6])
def test_beside_programs_batches_bring_more_a_second_than_any_common_one(bandwidth_hz):
    first, *others = even_fleet(4)
    devices = [replace(first, trains_one_block=True, batch_size=16), *others]

    def rate(sizes):
        run = statement(bandwidth_hz=bandwidth_hz, batch_sizes=sizes)
        parts = planned_blocks(run, solve_round(run, known(run, devices, EVEN_NOISE)))
        asked = [part.batch_size for part in parts]
        assert all(p.batch_size == 16 for p in parts if p.device == first.name)
        return rate_of(parts, asked, EVEN_NOISE)

    assert rate(GRID) >= max(rate((size,)) for size in GRID[1:]) * (1 - 1e-9)


def test_the_codec_is_the_finest_whose_error_costs_more_than_its_bits():
    devices, codecs = fleet(4), {}
    # So wide that a message is mostly values.
    shapes = {name: (a * 32, b * 32) for name, (a, b) in SHAPES.items()}
    costs = estimate_costs(shapes, PARTITION, batch_size=128, sequence_length=TOKENS)
    sizes = UpdateSizes(PARTITION, shapes, "auto", "every")
    for bandwidth_hz in (2e4, 1e5, 2e6, 1e9, 1e12):
        run = statement("auto", bandwidth_hz)
        run = replace(run, costs=costs, sizes=sizes)
        parts = planned_blocks(run, solve_round(run, known(run, devices)))
        (codecs[bandwidth_hz],) = {part.codec for part in parts}
    assert codecs == {
        **{2e4: "int2", 1e5: "int4", 2e6: "int8"},
        **{1e9: "bf16", 1e12: "fp32"},
    }


def test_blocks_that_large_batches_leave_no_memory_for_are_trained():
    run = statement(partial=True)
    small = max(float(COSTS.at(16).memory_bytes.max()), 1e5)
    devices = even_fleet(3, memory_bytes=small)
    solved = solve_round(run, replace(known(run, devices, EVEN_NOISE), partial=True))
    assert solved.stated.trained.all()


def test_a_device_in_a_fade_keeps_nobody_waiting_until_its_block_is_stale():
    run, devices = statement(), even_fleet(2)
    faded = replace(simulated_device(2, seed=3), flops_per_s=1e7, num_examples=1000)
    before = known(run, [*devices, replace(faded, uplink_bps=1e3)], EVEN_NOISE)
    trained = {}
    for rounds in (1, 4, 400):
        waited = np.array([1, 1, rounds])
        solved = solve_round(run, replace(before, rounds_since=waited))
        trained[rounds] = solved.stated.trained.tolist()
    assert sum(trained[1]) == 2
    # What has waited longest is trained by those with a good link.
    assert trained[4][2] and sum(trained[4]) == 2
    assert trained[400][2]
    better = known(run, [*devices, replace(faded, uplink_bps=1e5)], EVEN_NOISE)
    assert solve_round(run, better).stated.trained.all()


@pytest.mark.parametrize("num_faded", [1, 2, 3])
def test_nobody_waits_for_several_devices_that_hardly_hear_a_broadcast(num_faded):
    """Without one of two such devices the round is as long as with both."""
    layers = {f"layer.{n}.{m}": (4, 4) for n in range(6) for m in ("up", "down")}
    shapes = {"embed.w": (9, 4), **layers, "head.w": (2, 4)}
    partition = partition_parameters(shapes)
    costs = estimate_costs(
        shapes, partition, batch_size=max(GRID), sequence_length=TOKENS
    )
    down = DownlinkChannel(mode="broadcast", bandwidth_hz=2e5)
    run = replace(
        statement(),
        costs=costs,
        sizes=UpdateSizes(partition, shapes, "int8", "every"),
        channel=Channel(bandwidth_hz=1e9, fading="none", downlink_channel=down),
    )
    good = even_fleet(6, uplink_bps=None, snr_db=30.0)
    faded = [replace(device, snr_db=-20.0) for device in good[:num_faded]]

    def round_of(devices):
        before = known(run, devices, np.full(6, 50.0))
        before = replace(before, pace=0.2, downlink_bits=np.full(6, 1e6))
        parts = planned_blocks(run, solve_round(run, before))
        return max(part.latency_s for part in parts), {part.device for part in parts}

    usual_s, _ = round_of(good)
    latency_s, active = round_of([*faded, *good[num_faded:]])
    assert latency_s < 2 * usual_s
    assert active <= {device.name for device in good[num_faded:]}


def test_where_every_device_takes_part_nothing_is_left_out():
    devices = [*even_fleet(2), *fleet(1, uplink_bps=1e3)]
    run = statement(mode=RoundMode(participation="all"))
    before = replace(known(run, devices), wanted=run.allocation.mode)
    assert solve_round(run, before).stated.trained.all()


@pytest.mark.parametrize("sizes", [(0, 8), (8.5,)])
def test_batches_are_whole_numbers(sizes):
    with pytest.raises(UserError, match="batch_sizes"):
        AllocationOptions(batch_sizes=sizes)


class TestRounds:
    """A coordinator's rounds, with replies that say what squares gradients have."""

    DEVICES = ("id-0", "id-1", "id-2", "id-3")

    def coordinator(self):
        return make_coordinator(batch_size=64, batch_sizes=(8, 16, 32, 64))

    def replies(self, plan, **said):
        for device in plan.assignments:
            reply = honest_reply(plan, device)
            most = plan.assignments[device].batch_size
            few_square, all_square = 1.0 + 50.0 / (most // 8), 1.0 + 50.0 / most
            further = len(plan.assignments[device].blocks) - 1
            each = [few_square] * further + [all_square] * further
            squares = {
                "few-examples": most // 8,
                "few-square": few_square,
                "all-examples": most,
                "all-square": all_square,
                **({"further-squares": np.array(each).tobytes()} if further else {}),
            }
            record = {**reply.report, **squares, **said}
            yield replace(reply, report=record, num_examples=most)

    def test_what_devices_say_decides_about_the_next_batches(self):
        coordinator, asked = self.coordinator(), []
        for server_round in range(1, 34):
            plan = coordinator.plan_round(server_round, self.DEVICES)
            for assignment in plan.assignments.values():
                # Until 24 observations of each of its blocks are known.
                few = any(
                    len(coordinator.state.noise.signal.get(block, ())) < 24
                    for block in assignment.blocks
                )
                due = few or server_round % 4 == 0
                assert bool(assignment.measures_noise) == due
                asked.append(due)
                # These devices do not say how many examples they hold.
                assert 1 <= assignment.batch_size <= 32
            record = coordinator.complete_round(plan, self.replies(plan))
            assert record.refused == {}
            assert record.blocks[0].batch_size is not None
        assert all(asked[:12])
        assert 0 < sum(asked[-16:]) <= 8
        noise = coordinator.state.noise
        for block in range(3):
            assert noise.measured(block) == pytest.approx(50.0)
        # Of what was believed at first a part stays.
        assert (noise.scales(3) < 80).all()
        other = self.coordinator()
        other.restore(coordinator.snapshot())
        np.testing.assert_array_equal(
            other.state.noise.scales(3), coordinator.state.noise.scales(3)
        )

    @pytest.mark.parametrize(
        "lie",
        [
            {"few-examples": 0},
            {"few-examples": 10**9},
            {"all-examples": 10**9},
            {"few-square": -1.0},
            {"all-square": 1e30},
        ],
    )
    def test_what_cannot_be_is_refused(self, lie):
        coordinator = self.coordinator()
        plan = coordinator.plan_round(1, self.DEVICES)
        record = coordinator.complete_round(plan, self.replies(plan, **lie))
        assert record.refused == {"implausible": len(plan.assignments)}
        assert coordinator.state.noise.signal == {}

    @pytest.mark.parametrize("further", [b"\0" * 7, b"\0" * 800])
    def test_further_squares_are_as_many_as_blocks(self, further):
        coordinator = self.coordinator()
        plan = coordinator.plan_round(1, self.DEVICES)
        lie = {"further-squares": further}
        record = coordinator.complete_round(plan, self.replies(plan, **lie))
        assert record.refused == {"malformed-report": len(plan.assignments)}

    @pytest.mark.parametrize("square", [-1.0, math.nan, 1e30])
    def test_further_squares_that_cannot_be_are_refused(self, square):
        coordinator = self.coordinator()
        plan = coordinator.plan_round(1, self.DEVICES)
        further = {d: len(a.blocks) - 1 for d, a in plan.assignments.items()}
        assert sum(further.values()) > 0
        replies = [
            replace(
                reply,
                report={
                    **reply.report,
                    "further-squares": np.full(
                        2 * further[reply.device_id], square
                    ).tobytes(),
                },
            )
            for reply in self.replies(plan)
        ]
        record = coordinator.complete_round(plan, replies)
        lied = sum(count > 0 for count in further.values())
        assert record.refused == {"implausible": lied}

    def test_squares_that_nobody_asked_for_are_nothing(self):
        coordinator = make_coordinator()
        plan = coordinator.plan_round(1, self.DEVICES)
        assert not any(a.measures_noise for a in plan.assignments.values())
        record = coordinator.complete_round(plan, self.replies(plan))
        assert record.refused == {}
        assert coordinator.state.noise.signal == {}
        assert record.blocks[0].batch_size is None

    def test_a_checkpoint_from_before_there_was_noise_is_read(self):
        coordinator = self.coordinator()
        values = coordinator.state.to_values()
        del values["noise"]
        state = type(coordinator.state).from_values(values)
        assert state.noise == coordinator.state.noise
