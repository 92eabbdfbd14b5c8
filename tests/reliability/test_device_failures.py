"""Devices that fail: on the device, in the coordinator, and in the wait for them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lola_flwr.clients import BlockClient, BlockDevice
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.device.out_of_memory import usable_memory_bytes
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import fingerprint
from lola_flwr.strategies.block_rounds import BlockRounds
from lola_flwr.strategies.deadline import RoundDeadline
from lola_flwr.strategies.rounds import Waits
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.packing import pack
from lola_flwr.wire.records import Assignment
from tests.reliability.tiny_run import run
from tests.server.coordinators import (
    PARTITION,
    SHAPES,
    fleet_of_equals,
    honest_reply,
    make_coordinator,
)
from tests.strategies.in_process import InProcessGrid

IDS = ["id-0", "id-1", "id-2", "id-3"]


# --- on the device -------------------------------------------------------------------


@pytest.fixture
def fit(roberta, batch):
    """Return a function that lets a device train, and returns what it sends."""
    partition = partition_parameters(name for name, _ in roberta.named_parameters())
    parameters = dict(roberta.named_parameters())
    values = {n: parameters[n].numpy(force=True) for n in partition.trainable}

    def fit(batch_source=lambda *_: batch, memory_bytes=1e6, **options):
        device = BlockDevice(
            profile=simulated_device(0, seed=1),
            load_model=lambda: (roberta, partition),
            batch_source=batch_source,
            **options,
        )
        assignment = Assignment(
            server_round=1,
            block_index=2,
            share=1.0,
            batch_size=6,
            codec="fp32",
            base_fingerprint=fingerprint(roberta, partition.frozen),
            memory_bytes=memory_bytes,
        )
        return BlockClient(device).fit([pack(values)], assignment.to_record())

    return fit


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_out_of_memory_is_an_ordinary_reply(fit, allocate):
    # The system really is asked for these 4 PiB.
    arrays, num_examples, record = fit(lambda *_: allocate(2**50))
    assert (arrays, num_examples) == ([], 0)
    assert record["failure"] == "out-of-memory"
    assert record["detail"]
    assert fit()[2]["update-kind"] == "gradient", "it is still there"


def test_memory_is_checked_before_anything_is_trained(fit):
    def never(*_):
        raise AssertionError("the device has begun")

    record = fit(never, memory_bytes=1e15)[2]
    assert record["failure"] == "out-of-memory"
    assert record["detail"].startswith("block 2 needs 1e+15 B, there are ")
    # The memory of simulated devices is not that of the machine they share.
    simulated = fit(memory_bytes=1e15, simulated_compute_s=lambda _: 1.0)[2]
    assert simulated["update-kind"] == "gradient"


def test_other_errors_stay_errors(fit):
    def broken(*_):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        fit(broken)


def test_usable_memory_is_plausible(roberta):
    usable = usable_memory_bytes(roberta)
    assert 1e8 < usable < 1e14 or usable == math.inf


# --- in the coordinator --------------------------------------------------------------


def failure_reply(plan, device, kind="out-of-memory", **changes):
    reply = honest_reply(plan, device)
    record = {"failure": kind, "detail": "4 GiB\nneeded", **changes}
    return replace(reply, tensors=[], num_examples=0, report=record)


def test_out_of_memory_lowers_the_devices_budget_for_a_while():
    coordinator, ids = fleet_of_equals(4)
    fastest = {"flops-per-s": 9e6, "memory-bytes": 1e9, "snr-db": 60.0}
    coordinator.add_device("fast", {"name": "fast", **fastest})
    ids.append("fast")
    blocks = []
    for server_round in range(1, 8):
        plan = coordinator.plan_round(server_round, ids)
        blocks.append(plan.assignments["fast"].block_index)
        replies = [
            failure_reply(plan, d)
            if d == "fast" and a.block_index == 0
            else honest_reply(plan, d)
            for d, a in plan.assignments.items()
        ]
        record = coordinator.complete_round(plan, replies)
        assert record.refused == ({"out-of-memory": 1} if blocks[-1] == 0 else {})
    # Layers are of one size, but the first keeps most activations.
    costs = estimate_costs(SHAPES, PARTITION, batch_size=8, sequence_length=4)
    assert list(costs.memory_bytes) == sorted(set(costs.memory_bytes), reverse=True)
    assert blocks[0] == 0 and 0 not in blocks[1:2]
    assert blocks.count(0) <= 3, "it is tried again, ever less often"


@pytest.mark.parametrize("kind", ["out of order", 7, "x" * 10**6, b"\n", [1.0]])
def test_other_failures_are_counted_and_cannot_write_the_log(kind):
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, IDS)
    failing, *others = plan.assignments
    replies = [honest_reply(plan, d) for d in others]
    record = coordinator.complete_round(
        plan, [*replies, failure_reply(plan, failing, kind, detail=kind)]
    )
    assert record.refused == {"device-failure": 1}
    assert max(map(len, record.lines())) < 500
    assert not any("\n" in line for line in record.lines())


def test_who_failed_rests_and_comes_back():
    coordinator, ids = fleet_of_equals(4, correct_profiles=False)
    asked = []
    for server_round in range(1, 40):
        plan = coordinator.plan_round(server_round, ids)
        asked.append("id-0" in plan.assignments)
        replies = [honest_reply(plan, d) for d in plan.assignments if d != "id-0"]
        coordinator.complete_round(plan, replies)
    # Four equal devices for three blocks: it would have been asked in most rounds.
    assert 3 <= sum(asked) <= 6
    for server_round in range(40, 140):
        plan = coordinator.plan_round(server_round, ids)
        asked.append("id-0" in plan.assignments)
        coordinator.complete_round(
            plan, [honest_reply(plan, d) for d in plan.assignments]
        )
    assert sum(asked[-50:]) > 25, "it works again, and is asked as others are"


def test_a_device_that_is_needed_is_asked_though_it_failed():
    coordinator = make_coordinator()
    for server_round in range(1, 6):
        plan = coordinator.plan_round(server_round, IDS[:3])
        assert len(plan.assignments) == 3
        coordinator.complete_round(
            plan, [honest_reply(plan, d) for d in plan.assignments if d != "id-1"]
        )


def test_a_run_that_goes_leaves_blocks_out_rather_than_rounds():
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, IDS)
    coordinator.complete_round(plan, [honest_reply(plan, d) for d in plan.assignments])
    seen = set()
    for server_round in range(2, 8):
        plan = coordinator.plan_round(server_round, IDS[:2])
        seen |= {block for a in plan.assignments.values() for block in a.blocks}
        record = coordinator.complete_round(
            plan, [honest_reply(plan, d) for d in plan.assignments]
        )
        assert len(record.blocks) == 2
    assert seen == {0, 1, 2}, "each block has its turn"


# --- in the wait for them ------------------------------------------------------------


def test_the_deadline_follows_the_clock_of_rounds_before():
    deadline = RoundDeadline(factor=4.0, floor_s=60.0)
    assert deadline.wait_s(10.0) == math.inf
    # Ten modelled seconds take half a second here; what else may happen is soon known.
    for floor_s in (60.0, 30.0, 20.0):
        deadline.learn(10.0, [0.1, 0.2, 0.5, 0.5, 0.5, 0.5], asked=6)
        assert deadline.wait_s(10.0) == floor_s + 2.0
    assert deadline.wait_s(20.0) == 24.0
    for _ in range(30):
        deadline.learn(10.0, [0.5] * 6, asked=6)
    assert deadline.wait_s(10.0) == 8.0
    # As long as most are in time, it does not matter how late the others are.
    deadline.learn(10.0, [0.5, 0.5, 0.5, 7.9, 7.9], asked=6)
    assert deadline.wait_s(10.0) == 8.0


def test_the_deadline_grows_by_a_bounded_factor_where_most_are_late():
    deadline = RoundDeadline(factor=4.0, floor_s=60.0)
    deadline.learn(10.0, [0.5, 0.5], asked=2)
    waits = []
    for _ in range(8):
        deadline.learn(10.0, [0.5], asked=3)
        waits.append(deadline.wait_s(10.0) / 62.0)
    assert waits == [2.0, 4.0, 8.0, 16.0, 16.0, 16.0, 16.0, 16.0]
    deadline.learn(10.0, [0.5, 0.5], asked=3)
    assert deadline.wait_s(10.0) == 32.0


def test_a_first_round_ends_once_most_have_answered_long_ago():
    deadline = RoundDeadline(factor=4.0, floor_s=60.0)
    planned_s = [2.0, 2.0, 10.0, 10.0]
    assert deadline.wait_s(10.0, planned_s, [3.0]) == math.inf
    # Those that are missing may have been given more to do than the others.
    assert deadline.wait_s(10.0, planned_s, [3.0, 1.0]) == 60.0 + 4 * (3.0 + 4.0)
    for _ in range(10):
        deadline.learn(10.0, [10.0], asked=1)
    assert deadline.wait_s(10.0, planned_s, [30.0]) == 46.0
    assert deadline.wait_s(10.0, planned_s, [3.0, 1.0]) == 34.0
    assert deadline.wait_s(10.0, planned_s, [30.0, 30.0]) == 46.0


def test_the_deadline_is_of_those_that_do_not_fail():
    deadline = RoundDeadline(factor=4.0, floor_s=60.0)
    planned_s = [10.0] * 5
    # Three of five have failed at once, which says nothing of the other two.
    assert deadline.wait_s(10.0, planned_s, [], failed=3) == math.inf
    assert deadline.wait_s(10.0, planned_s, [20.0], failed=3) == 60.0 + 4 * 20.0
    assert deadline.wait_s(10.0, planned_s, [], failed=5) == math.inf


@pytest.mark.parametrize(
    "report", [{"failure": "out-of-memory"}, {"update-kind": "nothing"}]
)
def test_rounds_learn_from_those_that_do_not_fail(report):
    coordinator = make_coordinator(num_devices=6)
    rounds = BlockRounds(coordinator, min_available=6, waits=Waits(), on_round=None)
    devices = [f"id-{n}" for n in range(6)]
    plan = rounds.plan(1, connected=lambda: devices, ask_profiles=lambda new: {})
    failing = [*plan.assignments][: len(plan.assignments) - 1]
    rounds.complete(
        [
            honest_reply(plan, d, answered_s=0.1, upload_s=0.1, report=report)
            if d in failing
            else honest_reply(plan, d, answered_s=500.0, upload_s=0.5)
            for d in plan.assignments
        ]
    )
    plan = rounds.plan(2, connected=lambda: devices, ask_profiles=lambda new: {})
    assert plan is not None
    assert rounds.wait_s() > 500.0


def seconds_of_40_rounds(late):
    """Of six devices, which answer after two seconds or, one of them, when it likes."""
    coordinator = make_coordinator(num_devices=6)
    waits = Waits()
    deadline = RoundDeadline(waits.deadline_factor, waits.deadline_floor_s)
    seconds = 0.0
    for server_round in range(1, 41):
        plan = coordinator.plan_round(server_round, [f"id-{n}" for n in range(6)])
        planned_s = [*plan.planned_s.values()]
        honest = [2.0] * sum(device != late for device in plan.assignments)
        wait_s = deadline.wait_s(plan.allocation.round_s, planned_s, honest)
        answered_s = {d: 2.0 if d != late else wait_s - 1 for d in plan.assignments}
        record = coordinator.complete_round(
            plan,
            [
                honest_reply(plan, device, answered_s=at_s, upload_s=0.5)
                for device, at_s in answered_s.items()
            ],
        )
        assert not record.refused
        deadline.learn(
            plan.allocation.round_s, answered_s.values(), asked=len(answered_s)
        )
        seconds += max(answered_s.values())
    return seconds


def test_a_device_that_answers_just_before_each_deadline_is_soon_asked_no_more():
    assert seconds_of_40_rounds(None) == 80.0
    assert 100.0 < seconds_of_40_rounds("id-0") < 160.0


class TimedGrid(InProcessGrid):
    """Notes how long the replies of each round may take."""

    waits = ()

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if messages and messages[0].metadata.message_type == "train":
            TimedGrid.waits = (*TimedGrid.waits, timeout)
        return super().send_and_receive(messages, timeout=timeout)


@pytest.mark.parametrize("interface", ["message", "legacy"])
def test_rounds_have_a_deadline_under_both_interfaces(tmp_path, interface):
    TimedGrid.waits = ()
    run(tmp_path, num_rounds=3, interface=interface, make_grid=TimedGrid)
    first, *later = TimedGrid.waits
    assert first == 3600
    assert len(later) == 2
    assert [15 < wait_s < 600 for wait_s in later] == [True] * 2
