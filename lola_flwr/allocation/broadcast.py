"""Rounds that begin with a broadcast, at the rate of the worst device that takes part.

All devices of a round begin when the worst of them has the model. Which that is depends
on the allocation: a device in a deep fade may compute fast, and yet be worth leaving
out. For a longest wait W only devices that have the model by W can take part, and all
of these wait for W: an allocation problem as any other. Over an interval of waits the
problem in which all wait for its beginning, and may hear until its end, is a bound.
Intervals are halved, the one with the least bound first (branch and bound), until the
best allocation is no longer than any bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Any, NamedTuple

import numpy as np

from lola_flwr.allocation.allocators import allocate, find_allocator
from lola_flwr.allocation.exact import solve_exact
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.allocation.shares import with_best_shares
from lola_flwr.allocation.solution import Allocation, InfeasibleAllocation
from lola_flwr.arrays import BoolArray, Float64Array, IntArray
from lola_flwr.errors import UserError

# As far as sums of times can be told apart.
_ACCURACY = 1e-12


@dataclass(frozen=True, eq=False)
class Broadcast:
    """What a broadcast has to bring to whom.

    Parameters
    ----------
    bits
        What each device lacks, shape [K]. What one lacks that lacks more serves it,
        too, so that the most of them is sent.
    rate_bps
        At which rate each can receive, bit/s, shape [K]; infinite: it does not wait for
        the broadcast.
    """

    bits: Float64Array
    rate_bps: Float64Array

    @property
    def waits(self) -> BoolArray:
        """Tell who waits for it, shape [K]."""
        return np.isfinite(self.rate_bps)

    def wait_s(self, devices: IntArray | BoolArray) -> float:
        """Return how long it takes until all of some devices have it."""
        bits, rate_bps = self.bits[devices], self.rate_bps[devices]
        waits = np.isfinite(rate_bps)
        if not waits.any():
            return 0.0
        return float(bits[waits].max() / rate_bps[waits].min())

    def own_s(self, devices: IntArray) -> Float64Array:
        """Return how long each device takes to receive what some are sent, shape [K].

        Infinite where that is not all that it lacks, 0 where it does not wait.
        """
        waiting = devices[self.waits[devices]]
        bits = self.bits[waiting].max(initial=0.0)
        own_s = np.where(self.bits <= bits, bits / self.rate_bps, np.inf)
        return np.where(self.waits, own_s, 0.0)

    def of_rows(self, rows: IntArray) -> Broadcast:
        """Return the same for some of the devices."""
        return Broadcast(self.bits[rows], self.rate_bps[rows])

    def waiting(
        self, problem: AllocationProblem, wait_s: float, only: BoolArray | None = None
    ) -> AllocationProblem:
        """Return a problem in which devices begin after a wait.

        Parameters
        ----------
        problem
            The problem in which they begin at once.
        wait_s
            How long they wait.
        only
            Who can take part, shape [K] (default: all).
        """
        feasible = problem.feasible
        return replace(
            problem,
            compute_s=problem.compute_s + wait_s * self.waits[:, None],
            feasible=feasible if only is None else feasible & only[:, None],
        )


class Heard(NamedTuple):
    """An allocation, the problem with the wait for its broadcast, and that wait."""

    problem: AllocationProblem
    allocation: Allocation
    wait_s: float


def allocate_broadcast(
    problem: AllocationProblem,
    broadcast: Broadcast,
    allocator: str | Callable[..., Allocation] = "exact",
    **options: Any,
) -> Heard:
    """Assign blocks and bandwidth in a round that begins with a broadcast.

    Parameters
    ----------
    problem
        The instance, in which devices begin at once.
    broadcast
        What is sent to whom.
    allocator, options
        As for `allocate`. All but ``"exact"`` do not choose who is to hear: the
        broadcast reaches the worst device that could take part, unless in the end none
        does that is as bad (`settled`).

    Returns
    -------
    Heard
        In its problem only devices can take part that have the model by then. Of
        ``"exact"`` it is the optimum over blocks, shares and receivers together, with
        ``bound_s == round_s``.

    Raises
    ------
    InfeasibleAllocation
        As for `allocate`.
    UserError
        Devices send in turn.
    """
    if problem.in_turn:
        raise UserError(
            "Who is to hear a broadcast is not chosen for devices that send in turn; "
            "let them share the band, or receive one by one."
        )
    able = np.asarray(problem.feasible[:, problem.demand > 0].any(axis=1))
    wait_s = broadcast.wait_s(able)
    solve = find_allocator(allocator) if isinstance(allocator, str) else allocator
    if solve is solve_exact and not problem.all_devices and wait_s:
        search = _Search(problem, broadcast, options)
        for bits in np.unique(broadcast.bits[able & broadcast.waits]):
            served = (broadcast.bits <= bits) | ~broadcast.waits
            search.descend(float(bits), able & served)
        if search.best is not None:
            return search.result()
    # Where the search has found nothing, this says why.
    everyone = broadcast.waiting(problem, wait_s)
    allocation = allocate(everyone, solve, **options)
    if not problem.all_devices:
        # Others may have to wait for nobody.
        bound_s = max(allocation.bound_s - wait_s, 0.0)
        allocation = replace(allocation, bound_s=bound_s)
    return Heard(everyone, allocation, wait_s)


def settled(heard: Heard, broadcast: Broadcast) -> Heard:
    """Let nobody wait longer than for the worst device that does take part.

    Parameters
    ----------
    heard
        An allocation, which something may have changed since.
    broadcast
        What is sent to whom.
    """
    problem, allocation, before_s = heard
    active = np.flatnonzero(allocation.block_of_device >= 0)
    wait_s = broadcast.wait_s(active)
    if wait_s >= before_s:
        return heard
    blocks = allocation.block_of_device[active]
    problem = broadcast.waiting(problem, wait_s - before_s)
    finish_s = problem.compute_s[active, blocks] + allocation.upload_s(problem)[active]
    round_s = problem.constant_s + float(finish_s.max())
    # A bound that was reached is not missed by rounding.
    bound_s = min(allocation.bound_s, round_s)
    allocation = replace(allocation, round_s=round_s, bound_s=bound_s)
    return Heard(problem, allocation, wait_s)


class _Search:
    """The best allocation so far, over all that may be sent."""

    def __init__(
        self,
        problem: AllocationProblem,
        broadcast: Broadcast,
        options: dict[str, Any],
    ) -> None:
        self.best: Heard | None = None
        self._proven = True
        self._problem = problem
        self._broadcast = broadcast
        self._options = options

    def result(self) -> Heard:
        """Return the best allocation, with what is proven of it."""
        assert self.best is not None
        allocation = self.best.allocation
        bound_s = allocation.round_s if self._proven else math.nan
        return self.best._replace(allocation=replace(allocation, bound_s=bound_s))

    def descend(self, bits: float, able: BoolArray) -> None:
        """Search the rounds in which so many bits are sent, to some devices at most."""
        own_s = bits / self._broadcast.rate_bps
        levels = np.unique(own_s[able])
        # By bound; the ends of an interval of levels tell equal ones apart.
        heap: list[tuple[float, int, int]] = []

        def add(low: int, high: int) -> None:
            only = able & (own_s <= levels[high])
            relaxed = self._broadcast.waiting(self._problem, levels[low], only)
            try:
                allocation = allocate(relaxed, solve_exact, **self._options)
            except InfeasibleAllocation:
                return
            self._proven &= allocation.bound_s == allocation.round_s
            self._consider(allocation, only)
            heappush(heap, (allocation.round_s, low, high))

        add(0, levels.size - 1)
        while heap:
            bound_s, low, high = heappop(heap)
            assert self.best is not None
            if bound_s >= self.best.allocation.round_s * (1.0 - _ACCURACY):
                return
            if low < high:
                middle = (low + high) // 2
                add(low, middle)
                add(middle + 1, high)

    def _consider(self, found: Allocation, only: BoolArray) -> None:
        """Keep an allocation if it is the best, given the wait for its own devices."""
        broadcast = self._broadcast
        devices = np.flatnonzero(found.block_of_device >= 0)
        wait_s = broadcast.wait_s(devices)
        # Whoever has it by then could take part as well.
        in_time = ~broadcast.waits | (only & (broadcast.own_s(devices) <= wait_s))
        problem = broadcast.waiting(self._problem, wait_s, in_time)
        allocation = with_best_shares(
            problem,
            devices,
            found.block_of_device[devices],
            iterations=found.iterations,
            stop_reason=found.stop_reason,
        )
        best = self.best
        if best is None or allocation.round_s < best.allocation.round_s:
            self.best = Heard(problem, allocation, wait_s)
