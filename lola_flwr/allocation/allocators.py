"""One entry point for every allocator: by name, or any function of a problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from lola_flwr.allocation.baselines import (
    solve_greedy,
    solve_random,
    solve_random_with_shares,
)
from lola_flwr.allocation.crunch import solve_crunch, solve_crunch_with_shares
from lola_flwr.allocation.energy import solve_energy, solve_energy_worst
from lola_flwr.allocation.exact import solve_exact
from lola_flwr.allocation.infeasible import is_feasible
from lola_flwr.allocation.jbba import solve_jbba
from lola_flwr.allocation.problem import AllocationProblem, RoundMode
from lola_flwr.allocation.solution import Allocation
from lola_flwr.arrays import IntArray
from lola_flwr.errors import UserError, nearest
from lola_flwr.machine.imported import imported


class Allocator(Protocol):
    """A function (or an object with ``__call__``) that solves allocation problems.

    It should honour ``problem.demand`` and ``problem.all_devices``; `allocate` checks
    its answers.
    """

    def __call__(self, problem: AllocationProblem, /, **options: Any) -> Allocation:
        """Solve one problem."""


ALLOCATORS: Mapping[str, Callable[..., Allocation]] = {
    "exact": solve_exact,
    "jbba": solve_jbba,
    "crunch": solve_crunch,
    "crunch+shares": solve_crunch_with_shares,
    "random": solve_random,
    "random+shares": solve_random_with_shares,
    "greedy": solve_greedy,
}

# Allocators of problems with ``energy``, the fleet's and the worst device's.
ENERGY_ALLOCATORS: Mapping[str, Callable[..., Allocation]] = {
    "energy": solve_energy,
    "energy-worst": solve_energy_worst,
}

# Allocators that take devices to send with uniform power per sub-carrier.
UNIFORM_POWER_ALLOCATORS = frozenset({"jbba", "energy"})

# Allocators of devices that send in turn.
IN_TURN_ALLOCATORS = frozenset({"exact", "random", "greedy"})

# Allocators that take a ``seed``; give them another one each round.
RANDOM_ALLOCATORS = frozenset({"random", "random+shares"})


def allocate(
    problem: AllocationProblem,
    allocator: str | Callable[..., Allocation] = "exact",
    **options: Any,
) -> Allocation:
    """Assign blocks and bandwidth for one round.

    Parameters
    ----------
    problem
        The instance.
    allocator
        A name from `ALLOCATORS` or `ENERGY_ALLOCATORS`, ``"package.module:function"``,
        or any function from a problem to an `Allocation`.
    options
        Passed on to the allocator: ``seed`` for the random ones, ``max_iterations`` and
        others for the iterative ones, ``slack`` for those of energy.

    Returns
    -------
    An allocation that satisfies every constraint of the problem.

    Raises
    ------
    InfeasibleAllocation
        If no allocation exists; the message says why.
    ValueError
        If the allocator's name is unknown, or the answer of a caller's own allocator
        breaks a constraint.

    Notes
    -----
    Backups: after a first round without them, the blocks are ranked by the share of the
    band that they take, which is largest where a device computes slowly or has a poor
    channel, and so is most likely to be late. In this order up to `backups` blocks get
    one more device each, as long as a matching exists, and the round is solved again.
    The backup does the same work as the first device and has a share of its own;
    `Allocation.round_s` waits for both. A strategy that goes on with whichever gradient
    comes first ends no later than that.
    """
    solve = find_allocator(allocator) if isinstance(allocator, str) else allocator
    for name, known in {**ALLOCATORS, **ENERGY_ALLOCATORS}.items():
        if problem.in_turn and solve is known and name not in IN_TURN_ALLOCATORS:
            raise UserError(
                f"allocator={name!r} divides the band among devices, and here they "
                f"send in turn; use one of {', '.join(sorted(IN_TURN_ALLOCATORS))}."
            )
    if problem.mode.backups:
        allocation = _with_backups(problem, solve, options)
    else:
        allocation = solve(problem, **options)
    if solve not in ALLOCATORS.values():
        allocation.check(problem)
    return allocation


def find_allocator(name: str) -> Callable[..., Allocation]:
    """Return the allocator of a name, or import a caller's own.

    Parameters
    ----------
    name
        A name from `ALLOCATORS` or `ENERGY_ALLOCATORS`, or
        ``"package.module:function"``.

    Raises
    ------
    UserError
        Unknown name, or nothing callable at that place.
    """
    known = {**ALLOCATORS, **ENERGY_ALLOCATORS}
    if name in known:
        return known[name]
    if ":" in name:
        return imported("allocator", name)
    raise UserError(
        f"Unknown allocator {name!r}; use one of {', '.join(known)}, or "
        f"'package.module:function'.{nearest(name, known)}"
    )


def _with_backups(
    problem: AllocationProblem,
    solve: Callable[..., Allocation],
    options: Mapping[str, Any],
) -> Allocation:
    """Solve without backups, then again with one more device for the hardest blocks."""

    def needing(demand: IntArray) -> AllocationProblem:
        return replace(problem, mode=RoundMode(devices_per_block=demand.tolist()))

    demand = problem.demand
    alone = solve(needing(demand), **options)
    active = alone.block_of_device >= 0
    band = np.zeros(problem.num_blocks)
    np.maximum.at(band, alone.block_of_device[active], alone.share[active])
    left = min(problem.mode.backups, problem.num_devices - int(demand.sum()))
    for block in np.argsort(-band, kind="stable"):
        if left == 0:
            break
        if demand[block] == 0:
            continue
        demand[block] += 1
        if is_feasible(needing(demand)):
            left -= 1
        else:
            demand[block] -= 1
    if np.array_equal(demand, problem.demand):
        return alone
    return solve(needing(demand), **options)
