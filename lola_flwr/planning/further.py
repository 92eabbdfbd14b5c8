"""Let devices send blocks above their own too, where that brings more than it takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lola_flwr.allocation import FurtherProblem, further_blocks
from lola_flwr.arrays import IntArray
from lola_flwr.planning.candidates import beyond_part
from lola_flwr.planning.known import Known, RunStatement
from lola_flwr.planning.parts import Parts, noise_of, waited_rounds
from lola_flwr.planning.solution import SolvedRound
from lola_flwr.planning.timed import Trained, timed_anew


def with_further_blocks(
    run: RunStatement,
    known: Known,
    solved: SolvedRound,
    bounds: tuple[IntArray, IntArray],
) -> SolvedRound:
    """Let devices send more blocks than their own, with batches for that.

    Parameters
    ----------
    run
        What rounds have in common that have the batch which this one was solved for.
    known
        What is known before this one.
    solved
        The round, in which each device has a block and a batch of its own.
    bounds
        Batches between which devices may be given one, [A] each.
    """
    parts = Parts.of(solved, known)
    if not _may_send_more(run, parts):
        return solved
    most_further = np.minimum(_most_further(run, solved, parts), bounds[1])
    last = _furthest(run, known, solved, parts, bounds, most_further)
    if (last == parts.blocks).all():
        return solved
    assert solved.batch_size is not None
    problem = _problem(run, known, solved, parts, bounds, most_further, last)
    last, batch_size = further_blocks(problem, solved.batch_size[parts.rows])
    if (last == parts.blocks).all():
        return solved
    return _sending(run, known, solved, problem, last, batch_size)


def _may_send_more(run: RunStatement, parts: Parts) -> bool:
    """Whether a round's devices may send more than a block each at all."""
    return bool(
        run.allocation.further_blocks
        and run.costs.together is not None
        and run.num_blocks > 1
        and not run.ranks
        and (parts.count == 1).all()
    )


def _furthest(
    run: RunStatement,
    known: Known,
    solved: SolvedRound,
    parts: Parts,
    bounds: tuple[IntArray, IntArray],
    most_further: IntArray,
) -> IntArray:
    """Return up to which block each device may send all, [A].

    Not past a block of whose latest updates it gave its part; and nobody does that
    trains but one block, whose batch is given, or who lacks the memory for all above.
    """
    alone = parts.blocks
    stated, (least, most) = solved.stated, bounds
    given, able = known.given[stated.rows], stated.problem.feasible
    beyond = beyond_part(given, able, run.allocation.influence_factor)[parts.rows]
    beyond &= np.arange(run.num_blocks) > alone[:, None]
    last = np.where(beyond.any(axis=1), beyond.argmax(axis=1), run.num_blocks) - 1
    keeps = known.one_block[stated.rows] | stated.without_backward | stated.trains_all
    keeps = keeps[parts.rows] | (most <= least)
    keeps |= most_further < least
    return np.where(keeps, alone, last)


def _most_further(run: RunStatement, solved: SolvedRound, parts: Parts) -> IntArray:
    """Return the most examples with which devices can train all above theirs, [A].

    That takes the most memory that any of their choices does.
    """
    profiles = [solved.stated.profiles[row] for row in parts.rows]
    memory_bytes = np.array([profile.memory_bytes for profile in profiles])
    each, most = np.arange(parts.rows.size), np.zeros(parts.rows.size, np.int64)
    above = [range(first, run.num_blocks) for first in range(run.num_blocks)]
    largest = run.costs.largest or run.costs
    for size in sorted(run.allocation.batch_sizes):
        costs = largest.at(size).joined(above)
        required_bytes = costs.required_bytes(profiles)[each, parts.blocks]
        flops = costs.required_flops(profiles)[each, parts.blocks]
        once = flops <= costs.flops[parts.blocks]
        most[once & (required_bytes <= memory_bytes)] = size
    return np.minimum(most, parts.held_examples)


def _problem(
    run: RunStatement,
    known: Known,
    solved: SolvedRound,
    parts: Parts,
    bounds: tuple[IntArray, IntArray],
    most_further: IntArray,
    last: IntArray,
) -> FurtherProblem:
    """State what devices may do more, by what each further block takes."""
    stated, costs, (least, most) = solved.stated, run.costs, bounds
    rows, blocks, num_blocks = parts.rows, parts.blocks, run.num_blocks
    assert solved.batch_size is not None and costs.step is not None
    assert costs.example_flops is not None
    profiles = [stated.profiles[row] for row in rows]
    example_flops = costs.example_flops[blocks]
    flops = costs.required_flops(profiles)[np.arange(rows.size), blocks]
    flops += (solved.batch_size[rows] - costs.step.batch_size) * example_flops
    compute_s = solved.problem.compute_s[rows, blocks] - solved.downlink_s[rows]
    operation_s = compute_s / flops
    pairs = [(block, block + 1) for block in range(num_blocks - 1)]
    joined_flops = costs.joined(pairs).example_flops
    assert joined_flops is not None
    alone = run.payloads(known.server_round, stated.trained).bits
    joined = run.payloads(known.server_round, stated.trained, pairs).bits
    further_bits = np.roll(joined - alone, 1, axis=1)[solved.codec_level[rows]]
    return FurtherProblem(
        first=blocks,
        last=last,
        fixed_s=solved.downlink_s[rows]
        + compute_s
        - solved.batch_size[rows] * operation_s * example_flops,
        example_s=operation_s * example_flops,
        further_example_s=operation_s[:, None]
        * np.roll(joined_flops - costs.example_flops, 1),
        upload_s=solved.problem.full_band_upload_s[rows, blocks],
        further_upload_s=further_bits / stated.rate_bps[rows, None],
        noise_scale=noise_of(known, num_blocks),
        weight=waited_rounds(known, num_blocks) / num_blocks,
        least=least,
        most=most,
        most_further=most_further,
        constant_s=solved.problem.constant_s,
        pace=0.0 if known.pace is None else known.pace,
    )


def _sending(
    run: RunStatement,
    known: Known,
    solved: SolvedRound,
    problem: FurtherProblem,
    last: IntArray,
    batch_size: IntArray,
) -> SolvedRound:
    """Return the round in which devices send up to these blocks."""
    rows = np.flatnonzero(solved.allocation.block_of_device >= 0)
    blocks = problem.first
    spans = {
        int(first): tuple(range(first, end + 1))
        for first, end in zip(blocks, last, strict=True)
    }
    stated = replace(solved.stated, spans=spans)
    payloads = run.payloads(known.server_round, stated.trained, spans.values())
    stated = replace(stated, payloads=payloads)
    compute_s = solved.problem.compute_s.copy()
    compute_s[rows, blocks] = problem.compute_s(last, batch_size)
    full_band_upload_s = solved.problem.full_band_upload_s.copy()
    payload_bits = payloads.bits[solved.codec_level[rows], blocks]
    full_band_upload_s[rows, blocks] = payload_bits / stated.rate_bps[rows]
    examples = problem.examples(last, batch_size).astype(np.int64)
    trained = np.flatnonzero(examples)
    return timed_anew(
        replace(solved, stated=stated),
        run.costs.largest or run.costs,
        replace(
            solved.problem, compute_s=compute_s, full_band_upload_s=full_band_upload_s
        ),
        batch_size,
        Trained(trained, examples[trained], problem.weight[trained]),
    )
