"""What devices have memory for: plans, recomputation and faults."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import InfeasibleAllocation, RoundMode
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.costs.memory import Levers
from lola_flwr.system.devices import DeviceProfile
from tests.server.coordinators import PARTITION, SHAPES, honest_reply, make_coordinator


def test_memory_is_that_of_what_each_device_will_do():
    coordinator = make_coordinator(num_devices=0, batch_size=4000)
    small = {"flops-per-s": 1e9, "memory-bytes": 1e5, "snr-db": 10.0}
    for index in range(3):
        able = {"splits-batch": True} if index else {}
        coordinator.add_device(str(index), {"name": f"d{index}", **small, **able})
    with pytest.raises(InfeasibleAllocation, match="memory"):
        coordinator.plan_round(1, ["0"])
    # Those that can hold a block are too few for one each.
    plan = coordinator.plan_round(1, ["0", "1", "2"])
    assert set(plan.assignments) == {"1", "2"}
    assert sorted(b for a in plan.assignments.values() for b in a.blocks) == [0, 1, 2]
    coordinator.add_device("3", {"name": "d3", **small, "splits-batch": True})
    plan = coordinator.plan_round(1, ["0", "1", "2", "3"])
    assert set(plan.assignments) == {"1", "2", "3"}
    assert not plan.problem.feasible[0].any()


def test_a_device_that_has_to_run_layers_twice_takes_longer():
    coordinator = make_coordinator(num_devices=0, batch_size=4000)
    costs = estimate_costs(SHAPES, PARTITION, batch_size=4000, sequence_length=4)
    step = costs.step
    once, twice = (
        step.peak_bytes(Levers(4000, recompute_suffix=way))[0] for way in (False, True)
    )
    assert twice < 0.95 * once
    memories = [once, (once + twice) / 2, (once + twice) / 2, 1e9]
    for index, memory_bytes in enumerate(memories):
        profile = DeviceProfile(
            name=f"d{index}",
            flops_per_s=1e9,
            memory_bytes=memory_bytes,
            recomputes_suffix=index != 2,
        )
        coordinator.add_device(str(index), profile.to_properties())
    plan = coordinator.plan_round(1, ["0", "1", "2", "3"])
    np.testing.assert_array_equal(plan.problem.feasible[:, 0], [1, 1, 0, 1])
    one, two, _, most = plan.problem.compute_s[:, 0]
    assert one == most
    assert two - one == pytest.approx(step.recomputation().further_flops[0] / 1e9)
    # Several blocks, too.
    plan = coordinator.plan_round(2, ["1"])
    (assignment,) = plan.assignments.values()
    first = assignment.block_index
    once_s = costs.joined([assignment.blocks]).flops[first] / 1e9
    assert len(assignment.blocks) > 1
    assert plan.problem.compute_s[0, first] > 1.1 * once_s


@pytest.mark.parametrize(("peak", "fault"), [(None, False), (8e8, False), (9e9, True)])
def test_more_memory_than_a_device_offers_is_a_fault(peak, fault):
    coordinator = make_coordinator()
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
    reply = honest_reply(plan, next(iter(plan.assignments)))
    if peak is not None:
        reply = replace(reply, report={**reply.report, "peak-memory-bytes": peak})
    record = coordinator.complete_round(plan, [reply])
    part = next(b for b in record.blocks if b.status == "accepted")
    assert part.peak_memory_bytes == peak
    assert part.exceeds_memory == fault
    lines = [line for line in record.lines() if "fault of the cost model" in line]
    assert len(lines) == fault
    if fault:
        assert f"{part.device} took 9000.0 MB of memory" in lines[0]


def test_memory_that_does_not_suffice_is_named():
    coordinator = make_coordinator(num_devices=0, batch_size=4000)
    small = {"flops-per-s": 1e9, "memory-bytes": 1e5, "snr-db": 10.0}
    for index in range(3):
        coordinator.add_device(str(index), {"name": f"d{index}", **small})
    with pytest.raises(InfeasibleAllocation, match=r"block 0.*required_memory_bytes"):
        coordinator.plan_round(1, ["0", "1", "2"])


def test_devices_without_memory_are_excluded_and_counted_where_all_take_part():
    coordinator = make_coordinator(
        num_devices=3, batch_size=4000, mode=RoundMode(participation="all")
    )
    tiny = {"flops-per-s": 1e9, "memory-bytes": 1e5, "snr-db": 10.0}
    coordinator.add_device("tiny", {"name": "tiny", **tiny})
    plan = coordinator.plan_round(1, ["id-0", "id-1", "id-2", "tiny"])
    assert plan.solved.num_excluded == 1
    assert "tiny" not in plan.assignments
