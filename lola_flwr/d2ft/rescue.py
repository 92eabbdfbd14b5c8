"""Make pairs of device and block possible that only a reduced schedule makes so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from lola_flwr.allocation import AllocationProblem
from lola_flwr.arrays import BoolArray, Float64Array
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.reduced import reduced_costs, reduced_schedule
from lola_flwr.errors import UserError

# Of a latency target, what the computation may take: the upload needs the rest.
_COMPUTE_SHARE = 0.5

# Operations of the layers, by row of the problem and block.
Schedules = Mapping[tuple[int, int], tuple[Operation, ...]]


def with_reduced_schedules(
    problem: AllocationProblem,
    costs: BlockCosts,
    *,
    flops: Float64Array,
    whole: BoolArray,
    latency_target_s: float = math.inf,
) -> tuple[AllocationProblem, Schedules]:
    """Let devices take blocks that are too much for them, by doing less.

    Parameters
    ----------
    problem
        The round's problem, with the memory that each device offers.
    costs
        Costs of the blocks.
    flops
        Operations that the problem's times are of, shape [K, N].
    whole
        Who trains by whole steps alone, shape [K].
    latency_target_s
        Time that the round may take, seconds.

    Returns
    -------
    The problem in which a pair that lacks memory, or computes for longer than the
    target, has the costs of its best reduced schedule, if there is one; and these
    schedules. All other pairs are as they were.
    """
    num_blocks = problem.num_blocks
    if problem.memory_bytes is None or num_blocks < 2:
        return problem, {}
    one_layer = float(costs.memory_bytes[0] - costs.memory_bytes[1])
    if one_layer <= 0:
        return problem, {}  # a layer on the way back keeps nothing that could be saved
    compute_s, feasible = problem.compute_s.copy(), problem.feasible.copy()
    schedules: dict[tuple[int, int], tuple[Operation, ...]] = {}

    @cache
    def best(block: int, budget: int, kept: int) -> tuple[Operation, ...] | None:
        try:
            return reduced_schedule(
                num_blocks, block, compute_budget=budget, kept_layers=kept
            )
        except UserError:
            return None

    # Where a smaller part of the batch at a time would do, the pair is feasible.
    lacking = costs.memory_bytes[None, :] > problem.memory_bytes[:, None]  # [K, N]
    lacking &= ~problem.feasible
    late = problem.compute_s > latency_target_s
    for row, block in np.argwhere((lacking | late) & ~whole[:, None]).tolist():
        behind = num_blocks - 1 - block
        spare = float(problem.memory_bytes[row] - costs.memory_bytes[block])
        kept = behind + math.floor(spare / one_layer) if spare < 0 else behind
        # Forward passes of a layer: all forward, those behind it back, its weights.
        budget = num_blocks + behind + 2
        limit_s = _COMPUTE_SHARE * latency_target_s
        if late[row, block]:
            all_s = problem.compute_s[row, block] * costs.flops[block]
            budget = math.floor(budget * limit_s * flops[row, block] / all_s)
        found = best(block, budget, kept) if kept >= 0 else None
        if found is None:
            continue
        reduced_flops, _ = reduced_costs(costs, block, found)
        compute_s[row, block] *= reduced_flops / flops[row, block]
        feasible[row, block] = True
        schedules[row, block] = found
    return replace(problem, compute_s=compute_s, feasible=feasible), schedules
