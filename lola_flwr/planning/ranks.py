"""How many components each device of a round sends of its adapter's gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lola_flwr.allocation import RankProblem, own_ranks, progress
from lola_flwr.allocation.shares import with_best_shares
from lola_flwr.arrays import Float64Array
from lola_flwr.planning.known import Known, RunStatement
from lola_flwr.planning.parts import Parts, kept_by_rank
from lola_flwr.planning.solution import SolvedRound


def of_rank(run: RunStatement, rank: int | None) -> RunStatement:
    """Return what rounds have in common in which all devices have one rank."""
    if run.sizes is None or rank is None:
        return run
    return replace(run, sizes=replace(run.sizes, rank=rank))


def with_own_ranks(
    run: RunStatement, known: Known, solved: SolvedRound, batch_size: int
) -> SolvedRound:
    """Give each device its own rank, with matching, codec and batch as they are.

    Devices compute what they would at full rank. Where that has more conditions than
    the band's, all keep the common one.

    Parameters
    ----------
    run
        What the run's rounds have in common, with the codec of ``solved``.
    known
        What is known before this one, its pace too.
    solved
        The round, in which all devices have one rank.
    batch_size
        Examples of all devices' mini-batches.
    """
    problem = solved.problem
    if (
        solved.rank is None
        or problem.power_limited is not None
        or math.isfinite(run.latency_target_s)
    ):
        return solved
    whole = Parts.of(replace(solved, rank=None), known)
    rows, blocks = whole.rows, whole.blocks
    brought = whole.weight * progress(whole.asked(run, batch_size), whole.noise_scale)
    bits = _bits_by_rank(run, solved)[:, blocks].T  # [A, L]
    common = run.ranks.index(int(solved.rank.max()))
    upload_s = problem.full_band_upload_s[rows, blocks]
    rung = own_ranks(
        RankProblem(
            compute_s=problem.compute_s[rows, blocks],
            full_band_upload_s=upload_s[:, None] * bits / bits[:, [common]],
            worth=brought[:, None] * kept_by_rank(solved, known, run.ranks),
            constant_s=problem.constant_s,
            pace=0.0 if known.pace is None else known.pace,
        )
    )
    if (rung == common).all():
        return solved
    each = np.arange(rows.size)
    all_s = problem.full_band_upload_s.copy()
    all_s[rows, blocks] *= bits[each, rung] / bits[:, common]
    problem = replace(problem, full_band_upload_s=all_s)
    rank = np.zeros(problem.num_devices, np.int64)
    rank[rows] = np.array(run.ranks)[rung]
    rank_bits = np.zeros(problem.num_devices)
    rank_bits[rows] = bits[each, rung]
    own = replace(
        solved,
        problem=problem,
        # What bounds the latency of the common rank bounds no other.
        allocation=with_best_shares(
            problem,
            rows,
            blocks,
            iterations=solved.allocation.iterations,
            stop_reason="gain",
        ),
        rank=rank,
        rank_bits=rank_bits,
    )
    own.allocation.check(problem)
    return own


def _bits_by_rank(run: RunStatement, solved: SolvedRound) -> Float64Array:
    """Return the bits of each block's payload at each rank, [L, N]."""
    stated = solved.stated
    return np.array(
        [
            of_rank(run, rank)
            .payloads(solved.server_round, stated.trained, stated.spans.values())
            .bits[0]
            for rank in run.ranks
        ]
    )
