"""Time a round anew in which devices have batches, or blocks, of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from lola_flwr.allocation import AllocationProblem
from lola_flwr.allocation.shares import with_best_shares
from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.planning.pace import Brought
from lola_flwr.planning.round_problem import RoundProblem
from lola_flwr.planning.solution import SolvedRound


class Trained(NamedTuple):
    """What a round trains: blocks, examples of each, and what each brings, [B] each."""

    blocks: IntArray
    examples: IntArray
    weight: Float64Array

    def brought(self, round_s: float) -> Brought:
        """Return what a round of that latency brings by it."""
        return Brought(
            tuple(self.blocks.tolist()),
            tuple(self.examples.tolist()),
            tuple(self.weight.tolist()),
            round_s,
        )


def timed_anew(
    solved: SolvedRound,
    costs: BlockCosts,
    problem: AllocationProblem,
    batch_size: IntArray,
    trained: Trained,
) -> SolvedRound:
    """Return a round with the same matching, and other times.

    Parameters
    ----------
    solved
        The round before, with the blocks that each device sends now.
    costs
        What blocks cost with the largest batch.
    problem
        The times.
    batch_size
        Batch of each active device, in order of the rows, [A].
    trained
        What the round trains by that.
    """
    rows = np.flatnonzero(solved.allocation.block_of_device >= 0)
    blocks = solved.allocation.block_of_device[rows]
    allocation = with_best_shares(
        problem,
        rows,
        blocks,
        iterations=solved.allocation.iterations,
        # What bounds the latency of the common batch bounds no other.
        stop_reason="gain",
    )
    allocation.check(problem)
    return asking(
        replace(
            solved,
            stated=_claiming(solved.stated, costs, rows, blocks, batch_size),
            problem=problem,
            allocation=allocation,
        ),
        batch_size,
        trained,
    )


def asking(solved: SolvedRound, batch_size: IntArray, trained: Trained) -> SolvedRound:
    """Return a round that asks its active devices for these batches, [A]."""
    asked = np.zeros(solved.problem.num_devices, np.int64)
    asked[solved.allocation.block_of_device >= 0] = batch_size
    brought = trained.brought(solved.allocation.round_s)
    return replace(solved, batch_size=asked, brought=brought)


def _claiming(
    stated: RoundProblem,
    costs: BlockCosts,
    rows: IntArray,
    blocks: IntArray,
    batch_size: IntArray,
) -> RoundProblem:
    """State the time and memory that active devices' own batches take."""
    claimed_s, required_bytes = stated.claimed_s.copy(), stated.required_bytes.copy()
    for row, block, own in zip(rows, blocks, batch_size, strict=True):
        profile = stated.profiles[row]
        of_own = costs.at(int(own)).joined([stated.blocks(int(block))])
        needed = of_own.required_flops([profile])[0, block]
        claimed_s[row, block] = needed / profile.flops_per_s
        required_bytes[row, block] = of_own.required_bytes([profile])[0, block]
    return replace(stated, claimed_s=claimed_s, required_bytes=required_bytes)
