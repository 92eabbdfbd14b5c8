"""Why a problem has no solution, in one line that says what to change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lola_flwr.allocation.edges import edges_of
from lola_flwr.allocation.matching import any_matching, slots_of
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.solution import InfeasibleAllocation
from lola_flwr.arrays import BoolArray, IntArray

_LONGEST_LIST = 8


def is_feasible(problem: AllocationProblem) -> bool:
    """Whether any matching covers the round's blocks."""
    edges = edges_of(problem)
    if problem.all_devices and not edges.possible.any(axis=1).all():
        return False
    return bool(np.all(any_matching(edges.possible, edges.demand) >= 0))


def explain_infeasible(problem: AllocationProblem) -> InfeasibleAllocation:
    """Find what makes the problem infeasible and put it into an error to raise.

    Parameters
    ----------
    problem
        A problem that no matching solves.

    Returns
    -------
    The error; its message names the first cause found: a block that nobody can
    compute, too few devices, a device without any block (if all take part), or a set
    of blocks that too few devices can compute.

    Raises
    ------
    ValueError
        If the problem does have a solution.
    """
    edges = edges_of(problem)
    possible = edges.possible
    for column in np.flatnonzero(~possible.any(axis=0)):
        return _nobody_can(problem, int(edges.blocks[column]))
    needed = int(edges.demand.sum())
    if problem.num_devices < needed:
        return _too_few_devices(problem.num_devices, needed, edges.demand)
    if problem.all_devices and not possible.any(axis=1).all():
        device = int(np.flatnonzero(~possible.any(axis=1))[0])
        return InfeasibleAllocation(
            f"Device {problem.name_of(device)} can compute no block of this round, but "
            "with participation='all' every device must take part. Leave it out of the "
            "problem or use participation='needed'."
        )
    device_of_slot = any_matching(possible, edges.demand)
    if np.all(device_of_slot >= 0):
        raise ValueError("the problem has a solution; there is nothing to explain")
    columns, rows = _hall_violator(possible, edges.demand, device_of_slot)
    blocks, count = edges.blocks[columns], int(edges.demand[columns].sum())
    names = [problem.name_of(device) for device in edges.devices[rows]]
    plural = "s" if blocks.size > 1 else ""
    verb = "" if blocks.size > 1 else "s"
    return InfeasibleAllocation(
        f"Block{plural} {_listed(blocks)} need{verb} {count} devices, but only device"
        f"{'s' if rows.size > 1 else ''} {_listed(names)} can hold "
        f"{'them' if blocks.size > 1 else 'it'}. Add devices with more memory, lower "
        "the batch size, or train fewer blocks this round."
    )


def _nobody_can(problem: AllocationProblem, block: int) -> InfeasibleAllocation:
    """Error for a block without any edge; memory figures if they are known."""
    memory, required = problem.memory_bytes, problem.required_memory_bytes
    if memory is not None and required is not None and required[block] > memory.max():
        largest = int(np.argmax(memory))
        return InfeasibleAllocation(
            f"No device can hold block {block}: "
            f"required_memory_bytes={required[block]:.0f} B, largest "
            f"memory_bytes={memory[largest]:.0f} B (device "
            f"{problem.name_of(largest)}). Lower the batch size, split the block or "
            "add a device with more memory."
        )
    return InfeasibleAllocation(
        f"No device can compute block {block}: for all {problem.num_devices} devices "
        "feasible is False or the latency is infinite. Add a device that can, or leave "
        "the block out of this round."
    )


def _too_few_devices(
    num_devices: int, needed: int, demand: IntArray
) -> InfeasibleAllocation:
    what = f"{demand.size} blocks"
    if needed != demand.size:
        what += f" that need {needed} devices"
    remedy = (
        f"train at most {num_devices} blocks this round"
        if needed == demand.size
        else "lower devices_per_block"
    )
    return InfeasibleAllocation(
        f"Too few devices: {num_devices} for {what}. Add devices, or {remedy}."
    )


def _hall_violator(
    possible: BoolArray, demand: IntArray, device_of_slot: IntArray
) -> tuple[IntArray, IntArray]:
    """Columns that need more devices than they have neighbours, and those neighbours.

    By König's argument: start at an unfilled slot of a largest matching and alternate
    between all edges and matched ones. Every device reached is matched (otherwise the
    matching could grow), so the slots reached are one more than the devices.
    """
    slots = slots_of(demand)
    columns: BoolArray = np.zeros(demand.size, dtype=np.bool_)
    columns[slots[np.flatnonzero(device_of_slot < 0)[0]]] = True
    while True:
        rows = np.asarray(possible[:, columns].any(axis=1))
        filled = device_of_slot >= 0
        reached = columns.copy()
        reached[slots[filled][rows[device_of_slot[filled]]]] = True
        if np.array_equal(reached, columns):
            return np.flatnonzero(columns), np.flatnonzero(rows)
        columns = reached


def _listed(items: Sequence[object] | IntArray) -> str:
    shown = ", ".join(str(item) for item in items[:_LONGEST_LIST])
    left = len(items) - _LONGEST_LIST
    return f"{shown} and {left} more" if left > 0 else shown
