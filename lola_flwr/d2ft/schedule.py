"""Which operation each sub-network gets in each micro-batch, under a device's budgets.

The sub-networks are placed on devices, and every budget belongs to one device, so the
problem splits into one multiple-choice knapsack for each device: exactly one operation
for each pair of a sub-network and a micro-batch, the largest total value, and at most
the budgeted compute and traffic. Costs are small integers, so dynamic programming over
the pairs and what is left of the budgets is exact.

Source: D2FT, arXiv:2504.12471, whose problem this is. Its own solver is not public; the
two-stage heuristic here is one reading of how it has been described, kept as an
ablation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.d2ft.operations import Operation
from lola_flwr.errors import UserError


@dataclass(frozen=True)
class UnitCosts:
    """Integer costs of skip, forward only and full, in this order.

    Parameters
    ----------
    compute
        In forward passes of a sub-network: a backward pass that forms the gradient of
        inputs and of weights is two, one that forms that of inputs is one.
    traffic
        Messages across a border between devices: an activation out, a gradient back.
    """

    compute: tuple[int, int, int] = (0, 1, 3)
    traffic: tuple[int, int, int] = (0, 1, 2)


# Fine-tuning all weights, and low-rank adapters alone, whose own products are small.
FULL_TUNING = UnitCosts()
ADAPTER_TUNING = UnitCosts(compute=(0, 1, 2))


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of S sub-networks over M micro-batches.

    Parameters
    ----------
    fisher
        Forward score, shape [S, M].
    magnitude
        Backward score, shape [S].
    gradient
        What decides between micro-batches, shape [S, M].
    """

    fisher: Float64Array
    magnitude: Float64Array
    gradient: Float64Array


def operation_values(
    scores: Scores,
    device_of_subnetwork: IntArray,
    *,
    backward_weight: float = 3.0,
) -> Float64Array:
    """Return what each operation is worth, shape [S, M, 3].

    Parameters
    ----------
    scores
        Scores of the sub-networks.
    device_of_subnetwork
        Where each sub-network is placed, shape [S].
    backward_weight
        Worth of an average backward pass, in average forward passes. A backward pass
        costs two: if it is worth less, much runs forward only, which teaches a model
        little (measured with 1: about a point of accuracy less).

    Notes
    -----
    A forward pass earns the forward score, a backward pass the backward score, both in
    terms of their means over the device's sub-networks: what another device holds does
    not compete for its budget. The gradient score, scaled to at most a millionth,
    decides where these leave a tie, as the backward score does between micro-batches.
    """
    forward = _relative(scores.fisher, device_of_subnetwork)
    magnitude = np.broadcast_to(scores.magnitude[:, None], forward.shape)
    backward = _relative(magnitude, device_of_subnetwork)
    tie = 1e-6 * scores.gradient / max(float(scores.gradient.max()), 1e-300)
    full = forward + backward_weight * backward + tie
    return np.stack([np.zeros_like(forward), forward, full], axis=-1)


def solve_knapsack(
    values: Float64Array,
    costs: UnitCosts,
    *,
    compute_budget: int,
    traffic_budget: int | None = None,
) -> IntArray:
    """Choose one operation for each item, of the largest total value within budgets.

    Parameters
    ----------
    values
        Value of each item's operations, shape [I, 3]. An operation of value -inf is not
        to be chosen.
    costs
        What the operations cost.
    compute_budget
        Compute that all items may cost together.
    traffic_budget
        Traffic that they may cost together (default: no limit).

    Returns
    -------
    The operation of each item, shape [I].

    Raises
    ------
    UserError
        The budgets do not allow what has to run.

    Notes
    -----
    O(I * C * T * 3) time and a byte for each of I * C * T states, C and T being the
    budgets, which are cut to what all items can cost.
    """
    items = values.shape[0]
    compute = np.array(costs.compute)
    unlimited = traffic_budget is None
    traffic = np.zeros(3, np.int64) if unlimited else np.array(costs.traffic)
    most_compute = min(compute_budget, items * int(compute.max()))
    most_traffic = (
        0 if unlimited else min(traffic_budget or 0, items * int(traffic.max()))
    )
    if most_compute < 0 or most_traffic < 0:
        raise UserError(
            f"compute_budget={compute_budget} and traffic_budget={traffic_budget} must "
            "not be negative."
        )
    # best[c, t]: largest value of the items so far that costs at most c and t.
    best = np.zeros((most_compute + 1, most_traffic + 1))
    choice = np.empty((items, *best.shape), dtype=np.uint8)
    for item in range(items):
        options = np.full((3, *best.shape), -np.inf)
        for operation in Operation:
            c, t = int(compute[operation]), int(traffic[operation])
            if c <= most_compute and t <= most_traffic:
                options[operation, c:, t:] = (
                    best[: best.shape[0] - c, : best.shape[1] - t]
                    + values[item, operation]
                )
        choice[item] = options.argmax(axis=0)
        best = options.max(axis=0)
    if best[-1, -1] == -np.inf:
        raise UserError(
            f"compute_budget={compute_budget}, traffic_budget={traffic_budget} do not "
            "allow what has to run."
        )
    chosen = np.empty(items, np.int64)
    c, t = most_compute, most_traffic
    for item in reversed(range(items)):
        chosen[item] = taken = int(choice[item, c, t])
        c, t = c - int(compute[taken]), t - int(traffic[taken])
    return chosen


def solve_two_stage(
    values: Float64Array,
    costs: UnitCosts,
    *,
    compute_budget: int,
    traffic_budget: int | None = None,
    full_share: float = 0.75,
) -> IntArray:
    """Give full passes out first, then forward passes: a heuristic, for comparison.

    Parameters are those of `solve_knapsack`, and ``full_share``, the share of the
    budgets that full passes may take.

    Notes
    -----
    Stage 1 gives full passes to the items of the largest backward worth, stage 2
    forward passes to those of the largest forward worth among the others.
    """
    chosen = np.zeros(values.shape[0], np.int64)
    spent = np.zeros(2)
    budget = np.array(
        [compute_budget, np.inf if traffic_budget is None else traffic_budget]
    )
    forward = values[:, Operation.FORWARD]
    backward = values[:, Operation.FULL] - forward
    for operation, worth, limit in (
        (Operation.FULL, backward, full_share * budget),
        (Operation.FORWARD, forward, budget),
    ):
        cost = np.array([costs.compute[operation], costs.traffic[operation]])
        for item in np.argsort(-worth, kind="stable"):
            if chosen[item] == Operation.SKIP and np.all(spent + cost <= limit):
                chosen[item] = operation
                spent = spent + cost
    return chosen


SOLVERS = {"knapsack": solve_knapsack, "two-stage": solve_two_stage}


@dataclass(frozen=True)
class Budgets:
    """What a schedule may cost, as shares of running everything fully.

    Parameters
    ----------
    compute
        Share of the compute, in (0, 1].
    traffic
        Share of the traffic, in (0, 1].
    """

    compute: float = 1.0
    traffic: float = 1.0

    def __post_init__(self) -> None:
        for name in ("compute", "traffic"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must be in (0, 1].")


def schedule_subnetworks(
    values: Float64Array,
    device_of_subnetwork: IntArray,
    budgets: Budgets,
    *,
    costs: UnitCosts = FULL_TUNING,
    solver: str = "knapsack",
) -> IntArray:
    """Choose the operation of every sub-network in every micro-batch.

    Parameters
    ----------
    values
        What each operation is worth, shape [S, M, 3].
    device_of_subnetwork
        Where each sub-network is placed, shape [S].
    budgets
        Shares of the full cost that each device may spend.
    costs
        What the operations cost.
    solver
        A name from `SOLVERS`.

    Returns
    -------
    Operations, shape [S, M].
    """
    operations = np.zeros(values.shape[:2], np.int64)
    for device in np.unique(device_of_subnetwork):
        mine = np.flatnonzero(device_of_subnetwork == device)
        items = values[mine].reshape(-1, 3)
        chosen = SOLVERS[solver](
            items,
            costs,
            compute_budget=_units(budgets.compute, items.shape[0], costs.compute),
            traffic_budget=(
                None
                if budgets.traffic == 1
                else _units(budgets.traffic, items.shape[0], costs.traffic)
            ),
        )
        operations[mine] = chosen.reshape(mine.size, -1)
    return operations


def place_subnetworks(
    num_subnetworks: int, flops_per_s: npt.ArrayLike
) -> npt.NDArray[np.int64]:
    """Place sub-networks on devices so that all take as long, as far as they divide.

    Parameters
    ----------
    num_subnetworks
        Number of sub-networks S, all alike.
    flops_per_s
        Speed of each device, shape [K].

    Returns
    -------
    Device of each sub-network, shape [S].

    Notes
    -----
    One after the other, each to the device that will have finished it first: of equal
    sub-networks this gives the smallest largest time. Devices of one speed hold the
    same number, or one more.
    """
    speed = np.asarray(flops_per_s, dtype=np.float64)
    held = np.zeros(speed.size, np.int64)
    for _ in range(num_subnetworks):
        held[np.argmin((held + 1) / speed)] += 1
    # Neighbours in the model stay together: less crosses the borders between devices.
    return np.repeat(np.arange(speed.size), held)


def _units(share: float, num_items: int, unit_costs: tuple[int, int, int]) -> int:
    # A share such as 0.6 of 15 must not become 8 by rounding.
    return int(np.floor(share * num_items * max(unit_costs) + 1e-9))


def _relative(scores: Float64Array, device_of_subnetwork: IntArray) -> Float64Array:
    relative = np.ones_like(scores)
    for device in np.unique(device_of_subnetwork):
        mine = device_of_subnetwork == device
        mean = float(scores[mine].mean())
        if mean > 0:
            relative[mine] = scores[mine] / mean
    return relative
