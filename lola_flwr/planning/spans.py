"""Which blocks a device trains together, where there are fewer devices than blocks.

Each device trains several consecutive ones of the round's blocks, in one backward pass
down to the first, unless it can train but one. Where the devices have not the memory
for all of them, or can train but one each, the blocks that had fewest updates come
first: the round trains a part, the next one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lola_flwr.allocation import AllocationProblem, SpanCover, SpanProblem, solve_spans
from lola_flwr.arrays import BoolArray, Float64Array, IntArray
from lola_flwr.planning.candidates import lifted
from lola_flwr.planning.known import Known, RunStatement

# Blocks that one device trains together, by the first of them.
Spans = Mapping[int, tuple[int, ...]]


def rotates(problem: AllocationProblem) -> bool:
    """Whether too few devices can hold a block for all of a round's, one each.

    It is no such round if there is a block that nobody could ever train, or that needs
    several devices: then it is not for their number that blocks are left out.
    """
    demand = problem.demand
    able = problem.feasible[:, demand > 0].any(axis=1)
    return bool(
        able.sum() < demand.sum()
        and demand.max() == 1
        and problem.feasible[:, demand > 0].any(axis=0).all()
    )


def chosen_spans(
    run: RunStatement,
    known: Known,
    problem: AllocationProblem,
    *,
    rate_bps: Float64Array,
    memory_limit_bytes: Float64Array,
) -> tuple[Spans, float] | None:
    """Choose which blocks devices train together, so that the round ends earliest.

    Devices are taken back that had better rest only where the others cannot train all
    blocks.

    Parameters
    ----------
    run
        What the run's rounds have in common.
    known
        What is known before this one.
    problem
        The round's problem with one block a device.
    rate_bps, memory_limit_bytes
        As in `RoundProblem`.

    Returns
    -------
    The blocks of each device's part, by the first, with a lower bound on the round's
    latency, seconds; None where every device trains one block.
    """
    if (
        not rotates(problem)
        # These have ways of their own to do with fewer devices.
        or known.worth is not None
        or run.zeroth_order is not None
        or run.reduced_schedules
        or run.costs.together is None
    ):
        return None
    pairs = _Pairs(
        run,
        known,
        np.flatnonzero(problem.demand),
        rate_bps,
        problem.snr_of(slice(None)),
    )
    resting = int(np.isfinite(memory_limit_bytes).sum())

    def cover(back: int) -> SpanCover | None:
        limit = lifted(memory_limit_bytes, known.failures, back)
        return solve_spans(pairs.problem(limit))

    found = best = cover(0)
    for back in range(1, resting + 1):
        if found is not None and found.is_whole:
            break
        found = cover(back)
        best = found if best is None or (found and found.is_whole) else best
    if best is None:
        return None
    blocks = pairs.blocks
    spans = {
        int(blocks[span.first]): tuple(int(blocks[n]) for n in span.blocks)
        for span in best.spans
    }
    return spans, problem.constant_s + best.bound_s


class _Pairs:
    """What each device takes for each span of the round's blocks, shape [K, n, n].

    Parameters
    ----------
    run, known
        What is planned.
    blocks
        The round's blocks, rising, shape [n].
    rate_bps
        Rate of each device over the whole band, shape [K].
    snr
        As in `SpanProblem`.
    """

    def __init__(
        self,
        run: RunStatement,
        known: Known,
        blocks: IntArray,
        rate_bps: Float64Array,
        snr: Float64Array | None,
    ) -> None:
        shape = (len(known.profiles), blocks.size, blocks.size)
        speed = np.array([profile.flops_per_s for profile in known.profiles])
        self.blocks = blocks
        self._snr = snr
        self._longest_s = run.allocation.longest_round_s
        self._memory_bytes = np.array([p.memory_bytes for p in known.profiles])
        updates = np.asarray(known.block_updates, np.float64)[blocks]
        self._worth = 1.0 + updates.max() - updates
        self._beyond_one = known.one_block[:, None, None] & ~np.eye(
            blocks.size, dtype=bool
        )
        self._compute_s = np.zeros(shape)
        self._upload_s = np.zeros(shape)
        self._required_bytes = np.full(shape, np.inf)
        trained = np.isin(np.arange(run.num_blocks), blocks)
        for length in range(1, blocks.size + 1):
            starts = np.arange(blocks.size - length + 1)
            spans: list[Sequence[int]] = [
                blocks[n : n + length].tolist() for n in starts
            ]
            costs = run.costs.joined(spans)
            bits = run.payloads(known.server_round, trained, spans).bits[0]
            compute_s = known.estimate.correct(
                costs.required_flops(known.profiles) / speed[:, None], known.names
            )
            where = (slice(None), starts, starts + length - 1)
            firsts = blocks[starts]
            self._compute_s[where] = compute_s[:, firsts]
            self._upload_s[where] = bits[firsts] / rate_bps[:, None]
            required_bytes = costs.required_bytes(known.profiles)
            self._required_bytes[where] = required_bytes[:, firsts]

    def problem(self, memory_limit_bytes: Float64Array) -> SpanProblem:
        """Return the problem in which devices' blocks stay below some memory."""
        feasible: BoolArray = (
            (self._required_bytes <= self._memory_bytes[:, None, None])
            & (self._required_bytes < memory_limit_bytes[:, None, None])
            & (self._compute_s + self._upload_s <= self._longest_s)
            & ~self._beyond_one
        )
        return SpanProblem(
            compute_s=self._compute_s,
            full_band_upload_s=self._upload_s,
            feasible=feasible,
            worth=self._worth,
            snr=self._snr,
        )
