from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForSequenceClassification

from lola_flwr.allocation import AllocationProblem, InfeasibleAllocation
from lola_flwr.build import DeviceOptions, RoundSettings, coordinator_for
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.costs.of_model import model_costs
from lola_flwr.d2ft.operations import from_text
from lola_flwr.d2ft.reduced import reduced_costs
from lola_flwr.d2ft.rescue import with_reduced_schedules
from lola_flwr.d2ft.subnetworks import LayerNotUnderstood
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import fingerprint
from lola_flwr.planning import RoundProblem
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.payload import Payloads
from lola_flwr.wire.records import Assignment
from tests.d2ft.cases import make
from tests.server.coordinators import PARTITION, SHAPES, honest_reply, make_coordinator

COSTS = estimate_costs(SHAPES, PARTITION, batch_size=4000, sequence_length=4)
IDS = ["a", "b", "c"]


def fleet(memory_bytes, **options):
    coordinator = make_coordinator(num_devices=0, batch_size=4000, **options)
    for index, name in enumerate(IDS):
        properties = {"flops-per-s": 1e9 + index, "snr-db": 10.0}
        coordinator.add_device(
            name, {"name": name, "memory-bytes": memory_bytes, **properties}
        )
    return coordinator


def test_small_devices_take_deep_blocks_by_doing_less():
    # Room for the last block, and for one layer more.
    room = 1.01 * COSTS.memory_bytes[1]
    with pytest.raises(InfeasibleAllocation):
        fleet(room).plan_round(1, IDS)
    coordinator = fleet(room, reduced_schedules=True)
    plan = coordinator.plan_round(1, IDS)
    operations = {a.block_index: a.operations for a in plan.assignments.values()}
    assert operations[1] is operations[2] is None
    # One of the two layers behind block 0 keeps nothing, and it is not the last.
    assert operations[0] == "fof"
    record = coordinator.complete_round(
        plan, [honest_reply(plan, device) for device in plan.assignments]
    )
    assert record.refused == {}


def test_schedules_stay_with_their_devices_where_others_are_left_out():
    ones = np.ones((3, 2))
    schedules = {(0, 0): from_text("of"), (2, 0): from_text("ff")}
    whole = RoundProblem(
        problem=AllocationProblem(ones, ones, ones > 0),
        rows=np.arange(3),
        profiles=tuple(simulated_device(index, seed=0) for index in range(3)),
        rate_bps=np.ones(3),
        claimed_s=ones,
        downlink_s=np.zeros(3),
        required_bytes=ones,
        memory_limit_bytes=np.ones(3),
        payloads=Payloads(("",), ones[:1], np.ones(2, bool)),
        without_backward=np.zeros(3, bool),
        schedules=schedules,
        trains_all=np.zeros(3, bool),
    )
    problem = AllocationProblem(ones[1:], ones[1:], ones[1:] > 0)
    left = whole.of_rows(np.array([1, 2]), problem)
    assert left.schedules == {(1, 0): schedules[2, 0]}
    assert left.rows.tolist() == [1, 2]
    assert left.profiles == whole.profiles[1:]
    assert [left.operations(row, 0) for row in (0, 1)] == [None, "ff"]


def test_who_has_room_does_everything():
    coordinator = fleet(1.01 * COSTS.memory_bytes[0], reduced_schedules=True)
    plan = coordinator.plan_round(1, IDS)
    assert {a.operations for a in plan.assignments.values()} == {None}


def test_costs_are_those_of_the_schedule():
    compute_s = np.tile(COSTS.flops / 1e9, (2, 1))
    memory_bytes = np.array([COSTS.memory_bytes[2], 2 * COSTS.memory_bytes[0]])
    problem = AllocationProblem(
        compute_s,
        np.ones((2, 3)),
        COSTS.memory_bytes[None, :] <= memory_bytes[:, None],
        memory_bytes=memory_bytes,
    )
    target_s = float(compute_s[0, 1])  # block 0 takes longer
    reduced, schedules = with_reduced_schedules(
        problem,
        COSTS,
        flops=np.tile(COSTS.flops, (2, 1)),
        whole=np.zeros(2, bool),
        latency_target_s=target_s,
    )
    assert set(schedules) == {(0, 0), (0, 1), (1, 0)}
    assert reduced.feasible.all()
    for (row, block), operations in schedules.items():
        flops, memory = reduced_costs(COSTS, block, operations)
        assert reduced.compute_s[row, block] == pytest.approx(flops / 1e9)
        assert memory <= memory_bytes[row] * (1 + 1e-9)
    for row in (0, 1):
        assert reduced.compute_s[row, 0] <= 0.55 * target_s
    np.testing.assert_array_equal(reduced.compute_s[:, 2], compute_s[:, 2])


def test_without_the_memory_for_a_forward_pass_nothing_helps():
    coordinator = fleet(0.5 * COSTS.memory_bytes[2], reduced_schedules=True)
    with pytest.raises(InfeasibleAllocation):
        coordinator.plan_round(1, IDS)


def test_a_device_does_as_it_is_told():
    case = make("roberta")
    device = BlockDevice(
        profile=simulated_device(0, seed=1),
        load_model=lambda: (case.model, case.partition),
        batch_source=lambda *_: case.batch,
    )
    assignment = Assignment(
        server_round=1,
        block_index=0,
        share=1.0,
        batch_size=6,
        codec="fp32",
        base_fingerprint=fingerprint(case.model, case.partition.frozen),
    )
    parameters = dict(case.model.named_parameters())
    values = {n: parameters[n].detach().numpy() for n in case.partition.trainable}

    def flops(operations):
        with FlopCounterMode(display=False) as counter:
            update = device.train(replace(assignment, operations=operations), values)
        assert all(np.isfinite(array).all() for array in update.arrays.values())
        return counter.get_total_flops()

    assert flops("fss") < flops("foo") < flops(None)
    assert flops("fff") == flops(None)


def test_a_model_whose_layers_cannot_run_in_part_is_refused_at_the_start():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = GPTNeoXConfig(**sizes, num_hidden_layers=3, vocab_size=60, pad_token_id=0)
    model = GPTNeoXForSequenceClassification(config)
    partition = partition_parameters(name for name, _ in model.named_parameters())
    options = {
        "costs": model_costs(model, partition, batch_size=4, sequence_length=8),
    }
    coordinator_for(model, partition, **options)
    with pytest.raises(LayerNotUnderstood, match="GPTNeoXLayer"):
        coordinator_for(
            model,
            partition,
            settings=RoundSettings(devices=DeviceOptions(reduced_schedules=True)),
            **options,
        )
