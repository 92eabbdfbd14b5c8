"""The schedules of D2FT's steps, and what steps cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import (
    ADAPTER_TUNING,
    FULL_TUNING,
    Budgets,
    Scores,
    UnitCosts,
    place_subnetworks,
)
from lola_flwr.d2ft.steps import (
    StepSchedules,
    activation_bytes,
    compute_s,
    uploads_s,
)
from lola_flwr.errors import UserError
from lola_flwr.system.channel import Channel
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.own_channel import Moment

SKIP, FORWARD, FULL = Operation.SKIP, Operation.FORWARD, Operation.FULL
COSTS = [FULL_TUNING, ADAPTER_TUNING, UnitCosts(compute=(0, 1, 4))]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize(
    "schedules",
    [
        StepSchedules(micro_batches=5, budgets=Budgets(compute=0.6)),
        StepSchedules(
            micro_batches=6, budgets=Budgets(traffic=0.5), same_micro_batches=False
        ),
        StepSchedules(
            micro_batches=6, budgets=Budgets(traffic=0.5), shared_budgets=True
        ),
    ],
)
def test_equal_devices_do_as_much(schedules, costs):
    device_of = place_subnetworks(36, np.ones(4))
    for step in range(1, 4):
        operations = replace(schedules, costs=costs).operations(step, device_of)
        work = np.array(costs.compute)[operations].sum(axis=1)
        loads = np.bincount(device_of, work)
        assert loads.max() <= 1.05 * loads.min()
        most = schedules.budgets.compute * 36 * schedules.micro_batches
        assert work.sum() <= most * costs.compute[FULL] + 1e-9


@pytest.mark.parametrize("costs", COSTS)
def test_a_compute_budget_goes_into_full_passes(costs):
    """A backward pass is worth more than it costs, whatever it costs."""
    schedules = StepSchedules(
        micro_batches=10, budgets=Budgets(compute=0.6), costs=costs
    )
    operations = schedules.operations(1, np.zeros(12, np.int64))
    assert (operations == FULL).sum(axis=1).tolist() == 12 * [6]
    assert not (operations == FORWARD).any()
    # All run the same micro-batches.
    assert len({row.tobytes() for row in operations}) == 1


def test_scores_decide_where_budgets_are_shared():
    schedules = StepSchedules(
        micro_batches=4, budgets=Budgets(compute=0.5), shared_budgets=True
    )
    fisher = np.array([[4.0], [3.0], [2.0], [1.0]])
    scores = Scores(fisher, fisher[:, 0], np.zeros((4, 1)))
    operations = schedules.operations(1, np.zeros(4, np.int64), scores)
    work = np.array([0, 1, 3])[operations].sum(axis=1)
    assert work.tolist() == sorted(work, reverse=True)
    assert work[0] > work[3]
    own = replace(schedules, shared_budgets=False).operations(
        1, np.zeros(4, np.int64), scores
    )
    assert len({row.tobytes() for row in own}) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batches": 0},
        {"micro_batches": 2.5},
        {"micro_batches": True},
        {"backward_weight": 0.0},
        {"solver": "magic"},
        {"shared_budgets": "no"},
    ],
)
def test_schedules_out_of_range(options):
    with pytest.raises(UserError, match=next(iter(options))):
        StepSchedules(**options)


def test_budgets_that_let_nothing_run_are_refused():
    schedules = StepSchedules(budgets=Budgets(compute=0.01))
    with pytest.raises(UserError, match="raise the budgets"):
        schedules.operations(1, np.zeros(4, np.int64))


def test_a_step_computes_layer_by_layer_each_as_its_slowest_device():
    # Two layers of two sub-networks: the first device holds all of layer 0.
    operations = np.array([[FULL, SKIP], [FORWARD, FULL], [FULL, FULL], [SKIP, SKIP]])
    seconds = compute_s(
        operations,
        np.array([0, 0, 1, 2]),
        [10.0, 5.0, 1.0],
        num_layers=2,
        forward_flops=[100.0, 1000.0],
    )
    first = (3 * 100 + 1 * 100 + 3 * 1000) / 10
    assert seconds == pytest.approx(first + (3 * 100 + 3 * 1000) / 5)


def test_activations_are_an_output_and_a_gradient():
    operations = np.array([[FULL, SKIP], [FORWARD, FULL]])
    sent = activation_bytes(operations, [10, 20], 8)
    assert sent.tolist() == [4 * 8 * 2 * 10, 4 * 8 * (10 + 2 * 20)]


def test_uploads_follow_each_other_at_the_rate_that_a_link_is_known_to_have():
    profiles = [
        DeviceProfile("a", 1e9, 1e9, 10.0, uplink_bps=8e6),
        DeviceProfile("b", 1e9, 1e9, 10.0, uplink_bps=4e6),
    ]
    shared = {"channel": Channel(bandwidth_hz=1e6), "moment": Moment(1, 0.0, 0)}
    assert uploads_s([1e6, 1e6], profiles, **shared) == pytest.approx(1 + 2)
    unknown = [replace(profile, uplink_bps=None) for profile in profiles]
    assert uploads_s([1e6, 0], unknown, **shared) != pytest.approx(1)


def test_uploads_take_as_long_as_the_channel_says():
    profiles = [DeviceProfile(name, 1e9, 1e9, 10.0) for name in ("a", "b")]
    still = Channel(bandwidth_hz=1e6, fading="none")
    rate_bps = 1e6 * np.log2(1 + 10)
    sent = {"moment": Moment(1, 0.0, 0), "channel": still}
    assert uploads_s([1e6, 1e6], profiles, **sent) == pytest.approx(16e6 / rate_bps)
    sent["channel"] = Channel(own_rates=lambda *_: [1e6, 2e6])
    assert uploads_s([1e6, 1e6], profiles, **sent) == pytest.approx(8 + 4)
