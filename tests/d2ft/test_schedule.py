from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import (
    ADAPTER_TUNING,
    FULL_TUNING,
    Budgets,
    Scores,
    operation_values,
    place_subnetworks,
    schedule_subnetworks,
    solve_knapsack,
    solve_two_stage,
)
from lola_flwr.errors import UserError

ONE = np.zeros(1, np.int64)  # all sub-networks, of which there is one, on one device


def cost_of(operations, unit_costs):
    return np.array(unit_costs)[operations].sum(axis=1)


def worth(values, chosen):
    return float(values[np.arange(len(chosen)), chosen].sum())


def brute_force(values, costs, compute_budget, traffic_budget):
    every = np.array(list(product(range(3), repeat=len(values))))  # [3^I, I]
    fits = np.array(costs.compute)[every].sum(axis=1) <= compute_budget
    if traffic_budget is not None:
        fits &= np.array(costs.traffic)[every].sum(axis=1) <= traffic_budget
    total = values[np.arange(len(values)), every].sum(axis=1)
    return float(total[fits].max())


def random_scores(rng, num_subnetworks=24, num_micro_batches=5):
    shape = num_subnetworks, num_micro_batches
    return Scores(rng.random(shape), rng.random(num_subnetworks), rng.random(shape))


@pytest.mark.parametrize("costs", [FULL_TUNING, ADAPTER_TUNING])
def test_equals_brute_force(rng, costs):
    for _ in range(150):
        items = int(rng.integers(1, 7))
        values = rng.normal(size=(items, 3)) * [0, 1, 2]
        budgets = {
            "compute_budget": int(rng.integers(0, 3 * items + 2)),
            "traffic_budget": (
                None if rng.random() < 0.3 else int(rng.integers(0, 2 * items + 2))
            ),
        }
        chosen = solve_knapsack(values, costs, **budgets)
        assert worth(values, chosen) == pytest.approx(
            brute_force(values, costs, *budgets.values()), abs=1e-12
        )
        assert np.array(costs.compute)[chosen].sum() <= budgets["compute_budget"]


def test_what_has_to_run_does_and_an_impossible_demand_is_refused():
    values = np.array([[0.0, 1.0, 9.0], [-np.inf, -np.inf, 0.0]])
    chosen = solve_knapsack(values, FULL_TUNING, compute_budget=4)
    assert list(chosen) == [Operation.FORWARD, Operation.FULL]
    with pytest.raises(UserError, match=r"do not allow what has to run"):
        solve_knapsack(values, FULL_TUNING, compute_budget=2)


def test_the_two_stage_heuristic_keeps_budgets_and_loses_value(rng):
    lost = []
    for _ in range(100):
        values = operation_values(random_scores(rng, 1, 8), ONE).reshape(-1, 3)
        budgets = {"compute_budget": 14, "traffic_budget": 9}
        heuristic = solve_two_stage(values, FULL_TUNING, **budgets)
        assert np.array(FULL_TUNING.compute)[heuristic].sum() <= 14
        assert np.array(FULL_TUNING.traffic)[heuristic].sum() <= 9
        exact = worth(values, solve_knapsack(values, FULL_TUNING, **budgets))
        lost.append(1 - worth(values, heuristic) / exact)
    assert min(lost) >= -1e-12
    assert np.mean(lost) > 0.01


def test_between_micro_batches_the_gradient_score_decides():
    scores = Scores(
        fisher=np.ones((1, 4)),
        magnitude=np.ones(1),
        gradient=np.array([[0.1, 0.4, 0.3, 0.2]]),
    )
    # Half of 4 * 3 units: two full passes, worth 4 each, or one and three forward
    # passes, worth 1 each.
    operations = schedule_subnetworks(
        operation_values(scores, ONE), ONE, Budgets(compute=0.5)
    )
    assert list(operations[0]) == [
        Operation.SKIP,
        Operation.FULL,
        Operation.FULL,
        Operation.SKIP,
    ]


def test_forward_passes_alone_are_taken_where_backward_passes_are_worth_little():
    alike = Scores(np.ones((1, 5)), np.ones(1), np.zeros((1, 5)))
    counts = {}
    for weight in (1.0, 3.0):
        operations = schedule_subnetworks(
            operation_values(alike, ONE, backward_weight=weight),
            ONE,
            Budgets(compute=0.6),
        )
        counts[weight] = np.bincount(operations[0], minlength=3).tolist()
    # Nine units of compute, for skipped, forward only and full micro-batches.
    assert counts == {1.0: [0, 3, 2], 3.0: [2, 0, 3]}


def test_scores_are_compared_within_a_device():
    """What one device's sub-networks are worth says nothing about another's."""
    scores = Scores(
        fisher=np.array([[1.0, 1.0], [3.0, 3.0], [1000.0, 1000.0]]),
        magnitude=np.array([1.0, 3.0, 1000.0]),
        gradient=np.zeros((3, 2)),
    )
    values = operation_values(scores, np.array([0, 0, 1]), backward_weight=1.0)
    np.testing.assert_allclose(values[:, 0], [[0, 0.5, 1], [0, 1.5, 3], [0, 1, 2]])


@pytest.mark.parametrize("share", [0.5, 0.6])
def test_with_a_budget_each_all_subnetworks_run_as_often(rng, share):
    each = np.arange(24)
    alike = Scores(np.ones((24, 5)), np.ones(24), rng.random((24, 5)))
    operations = schedule_subnetworks(
        operation_values(alike, each), each, Budgets(traffic=share)
    )
    for operation in Operation:
        often = (operations == operation).sum(axis=1)
        assert (often == often[0]).all()
    assert (operations == Operation.FULL).any(axis=1).all()


@pytest.mark.parametrize("solver", ["knapsack", "two-stage"])
def test_budgets_are_kept_on_every_device(rng, solver):
    device = place_subnetworks(24, np.ones(6))
    budgets = Budgets(compute=0.6, traffic=0.5)
    operations = schedule_subnetworks(
        operation_values(random_scores(rng), device), device, budgets, solver=solver
    )
    compute = np.bincount(device, cost_of(operations, FULL_TUNING.compute))
    traffic = np.bincount(device, cost_of(operations, FULL_TUNING.traffic))
    assert compute.max() <= 0.6 * 4 * 5 * 3
    assert traffic.max() <= 0.5 * 4 * 5 * 2


def test_equal_devices_have_equal_loads(rng):
    for num_devices, budget in ((6, 0.6), (4, 0.6), (3, 0.5), (2, 0.7), (12, 0.6)):
        device = place_subnetworks(24, np.ones(num_devices))
        operations = schedule_subnetworks(
            operation_values(random_scores(rng), device),
            device,
            Budgets(compute=budget),
        )
        load = np.bincount(device, cost_of(operations, FULL_TUNING.compute))
        assert load.max() <= 1.05 * load.min()


def test_faster_devices_hold_more():
    device = place_subnetworks(12, [1.0, 2.0, 3.0])
    assert list(np.bincount(device)) == [2, 4, 6]
    # 5 on 2 devices: the slower is not to be the last by far.
    assert list(np.bincount(place_subnetworks(5, [1.0, 1.0]))) in ([3, 2], [2, 3])


def test_impossible_budgets_are_refused():
    with pytest.raises(UserError, match=r"compute=0 must be in"):
        Budgets(compute=0)
    with pytest.raises(UserError, match=r"must not be negative"):
        solve_knapsack(np.zeros((1, 3)), FULL_TUNING, compute_budget=-1)
