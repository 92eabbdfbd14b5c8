"""Rounds in which devices send some components of their adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest

from lola_flwr.build import RoundMode, RoundSettings, ServerStep, Transfer
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.device.encoding import encode_update
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.state import RunState
from lola_flwr.system.devices import DeviceProfile, InvalidProfile
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.components import components_of, rank_ladder
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.wire.payload import update_bytes
from lola_flwr.wire.records import UpdateReport
from tests.flat_settings import coordinator_of
from tests.server.coordinators import npy

RANK, WIDTH = 8, 150
SHAPES = {
    **{
        f"layer.{n}.q.lora_{factor}.default.weight": shape
        for n in range(3)
        for factor, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
    },
    "head.weight": (2, WIDTH),
}
NAMES = [*SHAPES]
PARTITION = BlockPartition(
    tuple((a, b) for a, b in zip(NAMES[:-1:2], NAMES[1:-1:2], strict=True)),
    (NAMES[-1],),
    (),
)
COSTS = estimate_costs(SHAPES, PARTITION, batch_size=8, sequence_length=4)
# The first component of every block is the largest by far.
SIZE = np.array([8.0, *[1.0] * (RANK - 1)])


def make(snr_db=(0.0, 10.0, 20.0), rank="auto", **options):
    values = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    options = {
        "bandwidth_hz": 1e5,
        "lr": 1e-2,
        "reputation": False,
        "rank": rank,
        **options,
    }
    coordinator = coordinator_of(PARTITION, values, COSTS, batch_size=8, **options)
    for index, own in enumerate(snr_db):
        coordinator.add_device(f"id-{index}", profile(index, own).to_properties())
    return coordinator


def profile(index, snr_db):
    return DeviceProfile(f"phone-{index}", 1e9, 1e9, snr_db=snr_db)


def gradients(server_round, device, block):
    rng = np.random.default_rng([server_round, int(device[-1]), block])
    found = {
        n: 1e-3 * rng.standard_normal(SHAPES[n]) for n in PARTITION.update_names(block)
    }
    a, b = PARTITION.blocks[block]
    found[a] *= SIZE[:, None]
    found[b] *= SIZE
    return {name: array.astype(np.float32) for name, array in found.items()}


def replies(plan):
    for device, asked in plan.assignments.items():
        report = UpdateReport(
            server_round=plan.server_round,
            block_index=asked.block_index,
            update_kind="gradient",
            loss=0.5,
            compute_s=None,
            compute_clock="simulated",
        )
        own = gradients(plan.server_round, device, asked.block_index)
        array = encode_update(own, PARTITION, asked, None)
        yield DeviceReply(device, [npy(array)], 8, report.to_record())


def one_round(coordinator, server_round):
    plan = coordinator.plan_round(server_round, [f"id-{n}" for n in range(3)])
    record = coordinator.complete_round(plan, replies(plan))
    assert record.refused == {}
    return plan, record


def test_off_unless_asked_for():
    coordinator = make(rank=None)
    plan, record = one_round(coordinator, 1)
    assert all(asked.components is None for asked in plan.assignments.values())
    assert (plan.drawn, plan.solved.rank) == ({}, None)
    assert [block.rank for block in record.blocks] == [None] * 3
    assert coordinator.state.components.squares == {}


def test_all_components_are_as_no_rank():
    plain, whole = make(rank=None), make(rank=RANK)
    for server_round in range(1, 4):
        one, other = (
            one_round(plain, server_round)[0],
            one_round(whole, server_round)[0],
        )
        assert one.assignments == other.assignments
    for name, values in plain.values().items():
        np.testing.assert_array_equal(values, whole.values()[name])


@pytest.mark.parametrize("rank", [1, 3])
def test_a_number_is_every_devices_rank(rank):
    plan, record = one_round(make(rank=rank), 1)
    for asked in plan.assignments.values():
        (components,) = components_of(asked).values()
        assert len(components) == rank
    shapes = dict.fromkeys(NAMES[:-1], (rank, WIDTH)) | {NAMES[-1]: (2, WIDTH)}
    names = PARTITION.update_names(0, head=True)
    counted = update_bytes(names, shapes, codec_named("fp32"))
    assert {block.payload_bytes for block in record.blocks} == {counted}
    assert {block.rank for block in record.blocks} == {rank}


def test_who_has_the_better_channel_sends_more():
    everybody = RoundMode(participation="all")
    coordinator = make(fading="none", mode=everybody)
    for server_round in range(1, 4):
        plan, record = one_round(coordinator, server_round)
        rank = dict(zip(plan.device_ids, plan.solved.rank.tolist(), strict=True))
        active = [rank[d] for d in sorted(plan.assignments)]
        assert active == sorted(active)
        # What is told, counted and sent is one thing.
        for block in record.blocks:
            own = next(d for d in plan.device_ids if f"phone-{d[-1]}" == block.device)
            asked = plan.assignments[own]
            sent = components_of(asked).get(block.block_index, range(RANK))
            assert len(sent) == block.rank == rank[own] in rank_ladder(RANK)
            assert block.payload_bytes > block.received_bytes > 0
            assert block.payload_bytes - block.received_bytes < 1500
        plan.allocation.check(plan.problem)
        assert f", rank {record.blocks[0].rank}, " in record.lines()[1]
    assert len({block.rank for block in record.blocks}) > 1


def test_the_largest_component_is_sent_most_often():
    coordinator = make(rank=2)
    counts = np.zeros(RANK)
    for server_round in range(1, 41):
        plan, _ = one_round(coordinator, server_round)
        if server_round > 10:
            for asked in plan.assignments.values():
                counts[components_of(asked)[asked.block_index]] += 1
    table = coordinator.state.components.of_blocks(3, RANK)
    assert (table[:, 0] > 30 * table[:, 1:].mean(axis=1)).all()
    assert counts[0] == 30 * 3  # certain
    assert counts[1:].min() > 0


def test_a_run_goes_on_to_the_same_bits():
    unbroken, first = make(), make()
    for server_round in (1, 2):
        one_round(unbroken, server_round)
        one_round(first, server_round)
    held = first.snapshot()
    stream = BytesIO()
    np.savez(stream, **held.arrays)
    stream.seek(0)
    again = make()
    again.restore(
        replace(
            held,
            arrays=dict(np.load(stream)),
            values=json.loads(json.dumps(held.values)),
        )
    )
    for server_round in (3, 4):
        one, other = (one_round(c, server_round)[0] for c in (unbroken, again))
        assert one.assignments == other.assignments
    for name, values in unbroken.values().items():
        np.testing.assert_array_equal(values, again.values()[name])


def test_a_state_of_before_knows_no_components():
    values = make().state.to_values()
    del values["components"]
    assert RunState.from_values(values).components.squares == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 9}, r"rank=9 is more than the adapters' own, 8"),
        ({"allocator": "energy"}, r"rank='auto' does not go with allocator='energy'"),
        ({"uplink": "tdma"}, r"rank='auto' is for devices that share the band"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "all"])
def test_no_rank_is_refused(rank):
    with pytest.raises(UserError, match=r"rank=.* must be a whole number, at least 1"):
        Transfer(rank=rank)


def test_other_ways_to_send_less_are_refused():
    with pytest.raises(UserError, match=r"rank=2 .* low_rank projects them; drop"):
        Transfer(rank=2, low_rank=LowRankProjection(4))
    settings = RoundSettings(transfer=Transfer(rank=2))
    for step, words in (
        (ServerStep(block_mean="median"), "block_mean='median'"),
        (ServerStep(steady=True), "steady=True"),
    ):
        with pytest.raises(UserError, match=f"of which {words} is no unbiased mean"):
            settings.check_step(step)
    with pytest.raises(UserError, match=r"rank=2 is for devices that send gradients"):
        settings.check_for_weights()


def test_programs_send_all_components():
    own = replace(profile(0, 3.0), trains_one_block=True)
    with pytest.raises(
        InvalidProfile, match=r"'phone-0' trains one block, as programs"
    ):
        make().add_device("id-0", own.to_properties())
    make(rank=None).add_device("id-0", own.to_properties())


@pytest.mark.parametrize("codec", ["int8", "auto"])
@pytest.mark.parametrize("batch_sizes", [(), (4, 8)])
def test_codec_and_batch_are_chosen_with_it(codec, batch_sizes):
    options = {"codec": codec, "batch_sizes": batch_sizes, "uplink": "ofdma"}
    coordinator = make(**options)
    plan = coordinator.plan_round(1, [f"id-{n}" for n in range(3)])
    assert len({asked.codec for asked in plan.assignments.values()}) == 1
    sizes = {asked.batch_size for asked in plan.assignments.values()}
    assert sizes <= {4, 5, 6, 7, 8}
    for block in [] if plan.solved.rank is None else plan.solved.rank.tolist():
        assert block in (0, *rank_ladder(RANK))


def test_power_limited_devices_have_one_rank():
    plan, record = one_round(make(uplink="power-limited"), 1)
    assert len({block.rank for block in record.blocks}) == 1
    plan.allocation.check(plan.problem)


def test_a_device_of_several_blocks_has_one_rank_for_them():
    coordinator = make(snr_db=(12.0,))
    plan = coordinator.plan_round(1, ["id-0"])
    (asked,) = plan.assignments.values()
    drawn = components_of(asked)
    assert asked.blocks == (0, 1, 2)
    rank = int(plan.solved.rank[0])
    assert {len(c) for c in drawn.values()} <= {rank}
    assert sorted(drawn) == ([0, 1, 2] if rank < RANK else [])
