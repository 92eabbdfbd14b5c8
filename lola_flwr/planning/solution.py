"""Solve a round's problem: who trains which block, with which share and codec."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from lola_flwr.allocation import (
    RANDOM_ALLOCATORS,
    Allocation,
    AllocationProblem,
    Heard,
    allocate,
    allocate_broadcast,
    refine_payloads,
    rotate,
    settled,
    share_blocks,
)
from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.planning.known import Known, RunStatement
from lola_flwr.planning.pace import Brought
from lola_flwr.planning.round_problem import RoundProblem
from lola_flwr.planning.statement import stated_round
from lola_flwr.randomness import rng_for
from lola_flwr.run.records import BlockRecord

_Kind = TypeVar("_Kind")


@dataclass(frozen=True, kw_only=True, eq=False)
class SolvedRound:
    """A round's problem and its solution.

    Parameters
    ----------
    server_round
        Round, from 1.
    stated
        The problem, for the coarsest codecs, and what it assumes.
    problem
        The problem that was solved in the end: devices have their own codecs.
    allocation
        The solution.
    codec_level
        Codec of each device, an index into ``stated.payloads.codecs``, shape [k].
    downlink_s
        Time that each device takes to have its message, which its time to compute in
        ``problem`` begins with, shape [k].
    num_excluded
        Devices that were left out where all others take part: they have not the memory
        for a block, or rest after failures.
    batch_size, noise_scale
        Where batches are chosen: examples of each device's mini-batch, 0 where idle,
        shape [k], and the noise scales of the blocks that these follow from, shape [N].
    brought
        Then, too: what the round brings.
    rank
        Where devices send some components of their adapters: how many each does, shape
        [k]; 0 where idle.
    rank_bits
        Where each device has a rank of its own: bits of its payload, shape [k].
    """

    server_round: int
    stated: RoundProblem
    problem: AllocationProblem
    allocation: Allocation
    codec_level: IntArray
    downlink_s: Float64Array
    num_excluded: int
    batch_size: IntArray | None = None
    noise_scale: Float64Array | None = None
    brought: Brought | None = None
    rank: IntArray | None = None
    rank_bits: Float64Array | None = None

    def active(self) -> Iterator[tuple[int, int]]:
        """Give row and block of each active device, in the order of the rows.

        Of several blocks that a device trains, it is the first.
        """
        for row, block in enumerate(self.allocation.block_of_device.tolist()):
            if block >= 0:
                yield row, block

    def overhearing(self) -> IntArray:
        """Return the rows of idle devices whom the broadcast brings all they lack."""
        broadcast = self.stated.broadcast
        if broadcast is None:
            return np.empty(0, np.int64)
        active = np.array([row for row, _ in self.active()], np.int64)
        hears = broadcast.waits & (broadcast.own_s(active) <= broadcast.wait_s(active))
        hears[active] = False
        return np.flatnonzero(hears)


def solve_round_at(run: RunStatement, known: Known) -> SolvedRound:
    """State a round's problem and solve it, with the batch that its costs are for.

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
    stated = stated_round(run, known)
    heard = _rotated(run, known, stated, _allocated(run, known, stated))
    problem, allocation, wait_s = heard
    if stated.bound_s < allocation.bound_s or math.isnan(stated.bound_s):
        # The best matching for these spans; others were not ruled out.
        allocation = replace(allocation, bound_s=stated.bound_s)
    problem, allocation = _shared(run, problem, allocation)
    problem, allocation, codec_level = refine_payloads(
        problem,
        allocation,
        stated.payloads.bits,
        slack=run.allocation.codec_slack,
        fixed=stated.without_backward,
    )
    allocation.check(problem)
    waits = 0.0 if stated.broadcast is None else stated.broadcast.waits
    return SolvedRound(
        server_round=known.server_round,
        stated=stated,
        problem=problem,
        allocation=allocation,
        codec_level=codec_level,
        downlink_s=stated.downlink_s + wait_s * waits,
        num_excluded=len(known.profiles) - len(stated.profiles),
        rank=_common_rank(run, allocation),
    )


def _common_rank(run: RunStatement, allocation: Allocation) -> IntArray | None:
    if run.sizes is None or run.sizes.rank is None:
        return None
    return np.where(allocation.block_of_device >= 0, run.sizes.rank, 0)


def matching_seed(seed: int, server_round: int) -> int:
    """Return the seed that a random allocator has in a round of a run."""
    return int(rng_for(seed, "matching", server_round).integers(2**31))


def _allocated(run: RunStatement, known: Known, stated: RoundProblem) -> Heard:
    options: dict[str, Any] = {}
    if run.allocation.allocator in RANDOM_ALLOCATORS:
        options["seed"] = matching_seed(run.seed, known.server_round)
    if run.allocation.saves_energy:
        options["slack"] = run.allocation.energy_slack
        options["longest_s"] = run.latency_target_s
    problem, allocator = stated.problem, run.allocation.allocator
    if stated.broadcast is None:
        return Heard(problem, allocate(problem, allocator, **options), 0.0)
    if run.allocation.saves_energy:
        # Who is to hear is who makes the round shortest; energy is saved among these.
        heard = allocate_broadcast(problem, stated.broadcast)
        saving = allocate(heard.problem, allocator, **options)
        return heard._replace(allocation=saving)
    return allocate_broadcast(problem, stated.broadcast, allocator, **options)


def _rotated(
    run: RunStatement, known: Known, stated: RoundProblem, heard: Heard
) -> Heard:
    """Let blocks meet other devices' data, where that costs little."""
    eps = run.allocation.rotation_eps
    if eps > 0:
        meetings = known.meetings[stated.rows]
        rotated = rotate(heard.problem, heard.allocation, meetings, eps=eps)
        heard = heard._replace(allocation=rotated)
    return heard if stated.broadcast is None else settled(heard, stated.broadcast)


def _shared(
    run: RunStatement, problem: AllocationProblem, allocation: Allocation
) -> tuple[AllocationProblem, Allocation]:
    """Let devices share blocks that would be idle, where that costs little."""
    eps = run.allocation.sharing_eps
    if eps <= 0:
        return problem, allocation
    longest_s = min((1.0 + eps) * allocation.round_s, run.latency_target_s)
    return share_blocks(problem, allocation, longest_s=longest_s)


def planned_blocks(run: RunStatement, solved: SolvedRound) -> tuple[BlockRecord, ...]:
    """Return each active device's part of a round, from the first block on."""
    stated, allocation = solved.stated, solved.allocation
    upload_s = allocation.upload_s(solved.problem)
    turn_s = allocation.turn_s(solved.problem)
    records = []
    for row, block in solved.active():
        level, downlink_s = solved.codec_level[row], float(solved.downlink_s[row])
        compute_s = float(solved.problem.compute_s[row, block]) - downlink_s
        codec = stated.payloads.codecs[level]
        payload_bits = stated.payloads.bits[level, block]
        if solved.rank_bits is not None:
            payload_bits = solved.rank_bits[row]
        if run.zeroth_order is not None and stated.without_backward[row]:
            # Projections on directions travel as they are.
            codec, payload_bits = "", run.zeroth_order.costs.payload_bits[block]
        records.append(
            BlockRecord(
                block_index=block,
                depth=run.num_blocks - block,
                device=stated.profiles[row].name,
                share=float(allocation.share[row]),
                downlink_s=downlink_s,
                compute_s=compute_s,
                upload_s=float(upload_s[row]),
                turn_s=float(turn_s[row]),
                reported_compute_s=None,
                compute_clock="",
                loss=None,
                status="planned",
                codec=codec,
                payload_bytes=int(payload_bits) // 8,
                required_memory_bytes=float(stated.required_bytes[row, block]),
                memory_bytes=stated.profiles[row].memory_bytes,
                further_blocks=stated.blocks(block)[1:],
                batch_size=_at_row(solved.batch_size, row, int),
                noise_scale=_at_row(solved.noise_scale, block, float),
                rank=_at_row(solved.rank, row, int),
                joules=stated.profiles[row].joules(compute_s, float(upload_s[row])),
            )
        )
    return tuple(sorted(records, key=lambda record: record.block_index))


def _at_row(values: Any, row: int, kind: Callable[[Any], _Kind]) -> _Kind | None:
    return None if values is None else kind(values[row])
