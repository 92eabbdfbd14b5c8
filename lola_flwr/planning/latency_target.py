"""The most valuable blocks that a round can finish in time, exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lola_flwr.allocation import (
    AllocationProblem,
    InfeasibleAllocation,
    RoundMode,
    allocate,
)
from lola_flwr.allocation.edges import Edges, edges_of
from lola_flwr.allocation.matching import cheapest_matching
from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.errors import UserError
from lola_flwr.machine.output import stdout_without

# How long the search may take, seconds, and what part of it the integer program may:
# its solver looks at the clock now and then.
_TIME_LIMIT_S = 0.5
_SOLVER_PART = 0.7

# What milp says.
_OPTIMAL, _OUT_OF_TIME = 0, 1

# The allocator's own accuracy is that of its latency.
_ACCURACY = 1e-9


@dataclass(frozen=True, kw_only=True)
class ChosenBlocks:
    """The blocks of a round.

    Parameters
    ----------
    blocks
        From the input to the output.
    gap
        None where no others are worth more. Where the search ended at its time limit,
        it is by how much others may at most be, relative: then another machine, or the
        same one at another time, may choose others.
    """

    blocks: tuple[int, ...]
    gap: float | None = None


def most_valuable_blocks(
    problem: AllocationProblem,
    values: Sequence[float] | Float64Array,
    *,
    latency_target_s: float = math.inf,
) -> tuple[int, ...]:
    """Return the blocks of `choose_blocks`, whether or not the search was completed."""
    return choose_blocks(problem, values, latency_target_s=latency_target_s).blocks


def fits_any_block(problem: AllocationProblem, latency_target_s: float) -> bool:
    """Tell whether a round of just one of the problem's blocks would be in time."""
    edges = edges_of(problem)
    share = _shares(edges, latency_target_s * (1 + _ACCURACY / 2) - problem.constant_s)
    return bool((_alone(share, edges.demand) <= 1.0).any())


def choose_blocks(
    problem: AllocationProblem,
    values: Sequence[float] | Float64Array,
    *,
    latency_target_s: float = math.inf,
    time_limit_s: float = _TIME_LIMIT_S,
) -> ChosenBlocks:
    """Choose the blocks of the largest total value that fit a round together.

    Parameters
    ----------
    problem
        The round's problem; its mode names the blocks to choose from, and how many
        devices each needs.
    values
        Value of each block, positive, shape [N].
    latency_target_s
        Time that the round may take under the best allocation, seconds; infinite: only
        memory and the number of devices limit the choice.
    time_limit_s
        Time that the search may take, seconds; see `ChosenBlocks`.

    Raises
    ------
    InfeasibleAllocation
        Not even one block fits; the message names the fastest.
    UserError
        A value is not positive, or devices send in turn, or all of them are to take
        part: then a round can only become faster by leaving devices out, not blocks.

    Notes
    -----
    For a deadline T each (device, block) pair needs a share ``w = tau / (T - c)`` of
    the band, and blocks fit if some matching of them costs at most 1 in all. The
    largest value is an integer program over the pairs: an assignment with one more
    constraint, the band. It is solved by HiGHS, whose constraints hold to a tolerance;
    so the answer is checked against the exact allocator, and a set that misses the
    target by rounding is forbidden, and the program solved again. Mostly that takes
    some milliseconds; but where values are nearly proportional to payloads that all
    devices upload equally fast, no solver is known that need not try most sets. Where
    the time is over before HiGHS has found any, blocks are added one by one.

    Of each block only as many of its cheapest pairs matter as devices are needed in
    all: of so many one is always free, and no dearer than any other.
    """
    worth = np.asarray(values, dtype=np.float64)
    if worth.shape != (problem.num_blocks,) or not (worth > 0).all():
        raise UserError(
            f"values must be {problem.num_blocks} positive numbers, one a block, but "
            f"are {worth.tolist()}."
        )
    if problem.in_turn:
        raise UserError("Blocks are not chosen for devices that send in turn.")
    if problem.all_devices:
        raise UserError(
            "Blocks cannot be left out of a round in which all devices take part; set "
            "participation='needed'."
        )
    started = time.perf_counter()
    edges = edges_of(problem)
    if not fits_any_block(problem, latency_target_s):
        raise _nothing_fits(problem, edges, latency_target_s)

    def in_time(columns: IntArray) -> bool:
        mode = _only(problem, edges.blocks[columns].tolist())
        best = allocate(replace(problem, mode=mode), "exact")
        return best.round_s <= latency_target_s * (1 + _ACCURACY)

    share = _shares(edges, latency_target_s - problem.constant_s)  # [k, n]
    worth = worth[edges.blocks]
    program = _Program(share, edges.demand, worth)
    forbidden: list[IntArray] = []
    while True:
        left_s = time_limit_s * _SOLVER_PART - (time.perf_counter() - started)
        columns, bound, is_best = program.solve(forbidden, max(left_s, 0.0))
        if columns is None or in_time(columns):
            break
        forbidden.append(columns)
    if columns is None:
        columns = _one_by_one(share, edges.demand, worth, in_time)
    if not columns.size:
        raise _nothing_fits(problem, edges, latency_target_s)
    blocks = tuple(edges.blocks[columns].tolist())
    gap = None if is_best else max(bound / float(worth[columns].sum()) - 1, 0.0)
    return ChosenBlocks(blocks=blocks, gap=gap)


def _shares(edges: Edges, time_s: float) -> Float64Array:
    """Return the least share of each pair, [k, n]; infinite where it is too late."""
    in_time = edges.possible & (edges.latency_s(1.0) <= time_s)
    # An impossible pair computes forever: inf - inf, where the target is infinite, too.
    with np.errstate(invalid="ignore"):
        return np.where(in_time, edges.least_share(time_s), np.inf)


def _alone(share: Float64Array, demand: IntArray) -> Float64Array:
    """Return the band that each block needs by itself, [n]: its cheapest devices'."""
    most = int(demand.max())
    if len(share) < most:
        share = np.pad(share, ((0, most - len(share)), (0, 0)), constant_values=np.inf)
    cheapest = np.sort(np.partition(share, most - 1, axis=0)[:most], axis=0)
    band: Float64Array = cheapest.cumsum(axis=0)[demand - 1, np.arange(demand.size)]
    return band


def _one_by_one(
    share: Float64Array,
    demand: IntArray,
    worth: Float64Array,
    in_time: Callable[[IntArray], bool],
) -> IntArray:
    """Return columns that fit, by adding those first that are worth most for band."""
    band = _alone(share, demand)
    chosen: IntArray = np.empty(0, np.int64)
    for column in np.argsort(band / worth, kind="stable"):
        more = np.sort(np.append(chosen, column))
        found = cheapest_matching(share[:, more], demand[more], all_devices=False)
        if found is not None and found[1] <= 1 + _ACCURACY and in_time(more):
            chosen = more
    return chosen


class _Program:
    """The integer program: pairs x [E] and blocks y [n], all of them 0 or 1."""

    def __init__(
        self, share: Float64Array, demand: IntArray, worth: Float64Array
    ) -> None:
        kept = np.isfinite(share)
        slots = int(demand.sum())
        if share.shape[0] > slots:
            dear = np.argpartition(share, slots - 1, axis=0)[slots:]
            np.put_along_axis(kept, dear, False, axis=0)
        self._rows, self._columns = np.nonzero(kept)
        self._share = share[self._rows, self._columns]
        self._demand, self._worth = demand, worth

    def solve(
        self, forbidden: Sequence[IntArray], time_limit_s: float
    ) -> tuple[IntArray | None, float, bool]:
        """Find the columns of the best set.

        Parameters
        ----------
        forbidden
            Sets of columns that are no answer.
        time_limit_s
            When to stop, seconds.

        Returns
        -------
        The columns, None where there is no set but the empty one, or none was found in
        time; what no set is worth more than; and whether that is proven of this one.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array, csr_array, hstack

        pairs, num_blocks = self._rows.size, self._worth.size
        if pairs == 0:
            return None, 0.0, True
        ones, number = np.ones(pairs), np.arange(pairs)
        served = coo_array((ones, (self._columns, number)), shape=(num_blocks, pairs))
        devices = np.unique(self._rows, return_inverse=True)[1]
        busy = coo_array((ones, (devices, number)))
        needed = csr_array(np.diag(-self._demand.astype(np.float64)))
        cuts = np.full((len(forbidden), num_blocks), -1.0)
        for row, columns in enumerate(forbidden):
            cuts[row, columns] = 1.0
        band = np.concatenate([self._share, np.zeros(num_blocks)])
        nothing = csr_array((busy.shape[0], num_blocks))
        constraints = [
            LinearConstraint(hstack([served, needed]), 0, 0),
            LinearConstraint(hstack([busy, nothing]), -np.inf, 1),
            LinearConstraint(band[np.newaxis], -np.inf, 1),
        ]
        if forbidden:
            sizes = np.array([columns.size for columns in forbidden])
            no_pairs = np.zeros((len(forbidden), pairs))
            constraints.append(
                LinearConstraint(np.hstack([no_pairs, cuts]), -np.inf, sizes - 1)
            )
        cost = np.concatenate([np.zeros(pairs), -self._worth / self._worth.max()])
        # It prints this even where it is told to be quiet.
        with stdout_without("HighsMipSolverData::"):
            found = milp(
                cost,
                integrality=np.ones(cost.size, np.int64),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "time_limit": time_limit_s},
            )
        if found.status not in (_OPTIMAL, _OUT_OF_TIME):
            raise RuntimeError(f"HiGHS found no set of blocks: {found.message}")
        bound = float(self._worth.sum())
        if found.mip_dual_bound is not None:
            bound = min(bound, -float(found.mip_dual_bound) * float(self._worth.max()))
        columns = np.empty(0, np.int64)
        if found.x is not None:
            columns = np.flatnonzero(found.x[pairs:] > 0.5)
        is_best = found.status == _OPTIMAL
        return (columns if columns.size else None), bound, is_best


def _only(problem: AllocationProblem, blocks: Sequence[int]) -> RoundMode:
    return replace(problem.mode, blocks=blocks, backups=0)


def _nothing_fits(
    problem: AllocationProblem, edges: Edges, latency_target_s: float
) -> InfeasibleAllocation:
    """Error that names the block that a round could finish first."""
    enough = edges.possible.sum(axis=0) >= edges.demand
    if not enough.any():
        return InfeasibleAllocation(
            "No block of this round can be computed by as many devices as it needs "
            f"({problem.num_devices} are there). Lower the batch size, or add devices "
            "with more memory."
        )
    alone = {
        int(block): allocate(replace(problem, mode=_only(problem, [int(block)])))
        for block in edges.blocks[enough]
    }
    fastest = min(alone, key=lambda block: alone[block].round_s)
    return InfeasibleAllocation(
        f"No block fits latency_target_s={latency_target_s:g} s: the fastest, block "
        f"{fastest}, takes {alone[fastest].round_s:.3g} s by itself. Raise the target."
    )
