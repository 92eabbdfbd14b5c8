"""How many examples a round asks of each device: for the least time to a target.

Where batches are to be chosen, a round is solved for each common batch of a grid and
each codec, whole: another batch may be another matching. The one that brings most for
its time wins, and then each device is given a batch of its own.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np

from lola_flwr.allocation import (
    BatchProblem,
    Broadcast,
    InfeasibleAllocation,
    Tried,
    best_candidate,
    own_batches,
    progress,
)
from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.planning.further import with_further_blocks
from lola_flwr.planning.known import Known, RunStatement
from lola_flwr.planning.parts import Parts, noise_of, waited_rounds
from lola_flwr.planning.ranks import of_rank, with_own_ranks
from lola_flwr.planning.solution import SolvedRound, solve_round_at
from lola_flwr.planning.timed import asking, timed_anew
from lola_flwr.wire.codec import AUTO, relative_error
from lola_flwr.wire.payload import UpdateSizes

# What is between, devices' own batches find. Smaller ones leave processors idle, larger
# ones hardly any task needs.
BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)


def solve_round(run: RunStatement, known: Known) -> SolvedRound:
    """State a round's problem and solve it, with what brings most a second.

    That is batches and ranks, where these are to be chosen, with a codec for all.

    Parameters
    ----------
    run
        What the run's rounds have in common.
    known
        What is known before this one.

    Raises
    ------
    InfeasibleAllocation
        The devices cannot compute the blocks.
    """
    if not run.allocation.batch_sizes and not run.ranks:
        return solve_round_at(run, known)
    grid = sorted(run.allocation.batch_sizes) or [run.batch_size]
    known = replace(known, uplink_bps=known.drawn(run))
    if run.ranks and known.component_squares is None:
        alike = np.ones((run.num_blocks, run.ranks[-1]))
        known = replace(known, component_squares=alike)
    ranks: tuple[int | None, ...] = run.ranks or (None,)
    codecs = ("",) if run.sizes is None else _codecs_of(run.sizes)
    levels = [(rank, codec) for rank in ranks for codec in codecs]
    runs = [of_rank(_of_codec(run, codec), rank) for rank, codec in levels]
    solved: dict[tuple[int, int], SolvedRound] = {}

    def attempt(batch_size: int, level: int) -> Tried | None:
        try:
            found = solve_round_at(_at(runs[level], batch_size), known)
        except InfeasibleAllocation:
            return None
        # Later rounds leave blocks out that no device can train: with a batch that is
        # too large for the devices' memory that would be most of them.
        first = next(iter(solved.values()), found)
        if found.stated.trained.sum() < first.stated.trained.sum():
            return None
        solved[batch_size, level] = found
        parts = Parts.of(found, known)
        return Tried(
            progress=parts.progress(parts.asked(run, batch_size)),
            round_s=found.allocation.round_s,
            bound_s=found.allocation.bound_s,
        )

    chosen = best_candidate(
        grid,
        [relative_error(codec) if codec else 0.0 for _, codec in levels],
        attempt,
        pace=known.pace,
        # Within a latency target finer codecs leave blocks out, and a level of higher
        # rank may be of a coarser codec.
        finer_is_longer=math.isinf(run.latency_target_s) and not run.ranks,
    )
    if chosen is None:
        # Says what is lacking.
        return solve_round_at(_at(runs[0], grid[0]), known)
    batch_size, level, rate = chosen
    if known.pace is None:
        known = replace(known, pace=rate)
    own = partial(_with_own_batches, _at(runs[level], batch_size), run, batch_size)
    best = solved[batch_size, level]
    found = own(known, best)
    return found if best.stated.spans else _without_what_waits(own, known, found)


class _Own(Protocol):
    """Gives devices their own choices, in a round that is given or has to be solved."""

    def __call__(
        self, known: Known, solved: SolvedRound | None = None
    ) -> SolvedRound: ...


def _without_what_waits(own: _Own, known: Known, found: SolvedRound) -> SolvedRound:
    """Leave blocks out of this round that take more time than they bring.

    A device in a fade has nearly all of the band, and all others wait. With a block
    less it is idle. While half of them stay, one more is left out: that of the device
    that brings least for its time, or the block that brings least, whose device another
    block is then for. Of all these rounds the best is taken: where two devices are in a
    fade, nothing is gained before both are idle. The longer a block has not been
    trained, the more it brings.
    """
    mode, gain, best = known.wanted, partial(_gain, known=known), found
    wanted = mode.demand(found.allocation.num_blocks) > 0
    fewest = -(-int(wanted.sum()) // 2)
    while (
        mode.participation == "needed" and known.worth is None and wanted.sum() > fewest
    ):
        without = {}
        for block in _dispensable(found, known):
            blocks = np.flatnonzero(wanted)
            fewer = replace(mode, blocks=tuple(blocks[blocks != block].tolist()))
            without[block] = own(replace(known, wanted=fewer))
        if not without:
            break
        block, found = max(without.items(), key=lambda tried: gain(tried[1]))
        wanted[block] = False
        best = max(best, found, key=gain)
    return best


def _dispensable(found: SolvedRound, known: Known) -> set[int]:
    """Return the blocks that a round may best do without, if any.

    What the device of a block takes is its share of the band, at the price at which a
    little more of it saves as much time, and its part of what the broadcast takes
    longer for those that hear worst.
    The more of the band there is, the less more of it saves: while all bring more than
    that, none is dispensable.
    """
    assert found.batch_size is not None and known.pace is not None
    parts, share = Parts.of(found, known), found.allocation.share
    rows, upload_s = parts.rows, found.allocation.upload_s(found.problem)
    with np.errstate(divide="ignore", invalid="ignore"):
        a_second = np.where(upload_s[rows] > 0, share[rows] / upload_s[rows], 0.0).sum()
    takes_s = share[rows] / a_second if a_second > 0 else np.zeros(rows.size)
    broadcast = found.stated.broadcast
    if broadcast is not None:
        takes_s += _broadcast_takes_s(broadcast, rows)
    brought = _brought_by_each(found, known, parts)
    left = brought - known.pace * takes_s
    if left.min() >= 0.0:
        return set()
    return {int(parts.blocks[n]) for n in (left.argmin(), parts.weight.argmin())}


def _broadcast_takes_s(broadcast: Broadcast, rows: IntArray) -> Float64Array:
    """Return how much longer a broadcast takes for each of the devices of a round.

    That is what it takes less without the device. But nothing is saved without one of
    two that hear equally badly: if that is more, it is its part of what is saved
    without all that hear as badly as it, and some more.
    """
    all_s = broadcast.wait_s(rows)
    without = [broadcast.wait_s(np.delete(rows, n)) for n in range(rows.size)]
    takes_s = all_s - np.array(without)
    own_s = broadcast.own_s(rows)[rows]
    worst_first = np.argsort(-own_s, kind="stable")
    saved_s = -np.diff(own_s[worst_first]).cumsum() / np.arange(1, rows.size)
    most_s = np.maximum.accumulate(saved_s[::-1])[::-1]
    takes_s[worst_first[:-1]] = np.maximum(takes_s[worst_first[:-1]], most_s)
    return np.asarray(takes_s)


def _brought_by_each(found: SolvedRound, known: Known, parts: Parts) -> Float64Array:
    """Return what a round would not bring without each of its devices, [A]."""
    assert found.batch_size is not None
    batch_size = found.batch_size[parts.rows]
    if not found.stated.spans:
        return np.asarray(parts.weight * progress(batch_size, parts.noise_scale))
    num_blocks = found.allocation.num_blocks
    noise_scale = noise_of(known, num_blocks)
    weight = waited_rounds(known, num_blocks) / num_blocks
    examples = np.zeros((batch_size.size, num_blocks))
    for n, block in enumerate(parts.blocks.tolist()):
        examples[n, list(found.stated.blocks(block))] = batch_size[n]
    together = examples.sum(axis=0)
    without = progress(together - examples, noise_scale) @ weight
    return np.asarray(progress(together, noise_scale) @ weight - without)


def _gain(solved: SolvedRound, known: Known) -> float:
    """Return what a round whose devices have their batches brings over its time."""
    assert solved.brought is not None and known.pace is not None
    brought = solved.brought.progress(noise_of(known, solved.allocation.num_blocks))
    return brought - known.pace * solved.allocation.round_s


def _codecs_of(sizes: UpdateSizes) -> tuple[str, ...]:
    """Return the codecs that a round may be solved with, coarsest first.

    Where the codec is to be chosen, "int2" and "int4" are among them: other than where
    batches are given, what their error takes from a round's progress counts.
    """
    return ("int2", "int4", *sizes.ladder) if sizes.codec == AUTO else sizes.ladder


def _of_codec(run: RunStatement, codec: str) -> RunStatement:
    """Return what rounds have in common in which all devices have one codec."""
    sizes = run.sizes
    if sizes is None or codec == sizes.codec:
        return run
    return replace(run, sizes=replace(sizes, codec=codec))


def _at(run: RunStatement, batch_size: int) -> RunStatement:
    """Return what rounds of one batch size have in common."""
    if not run.allocation.batch_sizes:
        return run
    return replace(run, costs=run.costs.at(batch_size))


def _with_own_batches(
    at: RunStatement,
    run: RunStatement,
    batch_size: int,
    known: Known,
    solved: SolvedRound | None = None,
) -> SolvedRound:
    """Give each device its own rank and batch, with matching and codec as they are.

    Where that has more conditions than the band's, all keep the common ones.
    """
    if solved is None:
        solved = solve_round_at(at, known)
    if run.ranks:
        solved = with_own_ranks(at, known, solved, batch_size)
    parts = Parts.of(solved, known)
    stated, problem = solved.stated, solved.problem
    rows, blocks = parts.rows, parts.blocks
    held = parts.asked(run, batch_size)
    if (
        not run.allocation.batch_sizes
        or stated.spans
        or problem.power_limited is not None
        or math.isfinite(run.latency_target_s)
    ):
        return _asking(solved, known, parts, held)
    assert at.costs.example_flops is not None
    each = np.arange(rows.size)
    flops = at.costs.required_flops([stated.profiles[row] for row in rows])
    compute_s = problem.compute_s[rows, blocks] - solved.downlink_s[rows]
    example_s = compute_s * at.costs.example_flops[blocks] / flops[each, blocks]
    least, most = _bounds(run, solved, parts, held)
    # What the times are for: a step of a size of its own takes as long for fewer.
    timed = np.where(parts.own_size > 0, held, batch_size)
    found = own_batches(
        BatchProblem(
            fixed_s=(problem.compute_s[rows, blocks] - timed * example_s).clip(0),
            example_s=example_s,
            full_band_upload_s=problem.full_band_upload_s[rows, blocks],
            noise_scale=parts.noise_scale,
            weight=parts.weight,
            least=least,
            most=most,
            constant_s=problem.constant_s,
            pace=0.0 if known.pace is None else known.pace,
        )
    ).batch_size
    all_s = problem.compute_s.copy()
    all_s[rows, blocks] += (found - timed) * example_s
    own = timed_anew(
        replace(solved, noise_scale=noise_of(known, run.num_blocks)),
        run.costs,
        replace(problem, compute_s=all_s),
        found,
        parts.trained(found),
    )
    return with_further_blocks(at, known, own, (least, most))


def _asking(
    solved: SolvedRound, known: Known, parts: Parts, batch_size: IntArray
) -> SolvedRound:
    noise_scale = noise_of(known, solved.allocation.num_blocks)
    return asking(
        replace(solved, noise_scale=noise_scale), batch_size, parts.trained(batch_size)
    )


def _bounds(
    run: RunStatement, solved: SolvedRound, parts: Parts, held: IntArray
) -> tuple[IntArray, IntArray]:
    """Return the batches between which devices may be given one, [A] each.

    As many examples as a device holds, and as its memory does without running layers
    twice. Whoever does less than a whole step, or has lacked memory, keeps what all
    have, and so does who runs layers twice for that, or has steps of a size of its own.
    """
    stated, rows, blocks = solved.stated, parts.rows, parts.blocks
    profiles = [stated.profiles[row] for row in rows]
    memory_bytes = np.array([profile.memory_bytes for profile in profiles])
    each, most = np.arange(rows.size), np.zeros(rows.size, np.int64)
    for size in sorted(run.allocation.batch_sizes):
        costs = run.costs.at(size)
        required_bytes = costs.required_bytes(profiles)[each, blocks]
        once = costs.required_flops(profiles)[each, blocks] <= costs.flops[blocks]
        most[once & (required_bytes <= memory_bytes)] = size
    keeps = stated.without_backward[rows] | stated.trains_all[rows] | (most < held)
    keeps |= parts.own_size > 0
    keeps |= np.isfinite(stated.memory_limit_bytes[rows])
    keeps |= [pair in stated.schedules for pair in zip(rows, blocks, strict=True)]
    most = np.where(keeps, held, np.minimum(most, parts.held_examples))
    return np.where(
        keeps, held, np.minimum(min(run.allocation.batch_sizes), most)
    ), most
