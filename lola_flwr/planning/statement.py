"""State a round's problem: what which block costs which device, and what is asked.

A chain of stages, each a function from frozen values to frozen values: from what a run
has in common and what is known before a round to a problem that can be solved.
`stated_round` is the chain; a run, `lola-flwr plan` and the figures go through it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import replace

import numpy as np

from lola_flwr.allocation import (
    AllocationProblem,
    EnergyCosts,
    PowerLimitedUplink,
)
from lola_flwr.allocation.infeasible import is_feasible
from lola_flwr.arrays import BoolArray, Float64Array
from lola_flwr.d2ft.reduced import reduced_costs
from lola_flwr.d2ft.rescue import with_reduced_schedules
from lola_flwr.planning.candidates import beyond_part, lifted, narrowed, spared
from lola_flwr.planning.downlink import alone_s, heard_by_some, received
from lola_flwr.planning.known import Known, RunStatement
from lola_flwr.planning.latency_target import choose_blocks, fits_any_block
from lola_flwr.planning.round_problem import RoundProblem
from lola_flwr.planning.spans import chosen_spans, rotates
from lola_flwr.planning.windows import beyond_one, chosen_windows, window_costs
from lola_flwr.system.channel import full_band_snr
from lola_flwr.zeroth_order.mixing import mix

# Where batches are chosen, a device that would keep a round waiting for so many times
# what rounds usually take, had it the whole band to itself, is in a fade.
_TIMES_USUAL = 4.0


def stated_round(run: RunStatement, known: Known) -> RoundProblem:
    """State a round's problem, from what is known to what is asked of whom.

    Parameters
    ----------
    run
        What the run's rounds have in common.
    known
        What is known before this one.

    Raises
    ------
    InfeasibleAllocation
        None of the wanted blocks can be trained within the latency target.
    """
    stated = claimed(run, known)
    stated = together(run, known, stated)
    stated = training_all(run, known, stated)
    stated = reduced(run, known, stated)
    stated = without_backward(run, known, stated)
    stated = charged(run, stated)
    stated = powered(stated)
    stated = received(run, known, stated)
    stated = bounded(run, known, stated)
    stated = in_time(run, known, stated)
    stated = uploading(run, known, stated)
    stated = asked(run, known, stated)
    # Who sends the head depends on which blocks are trained after all.
    return uploading(run, known, stated)


def claimed(run: RunStatement, known: Known) -> RoundProblem:
    """State the problem by profiles, costs and channel, corrected by what was seen."""
    profiles, names = known.profiles, known.names
    for profile in profiles:
        run.channel.check_profile(profile)
    every_block = np.ones(run.num_blocks, bool)
    payloads = run.payloads(known.server_round, every_block)
    speed = np.array([profile.flops_per_s for profile in profiles])
    memory_bytes = np.array([profile.memory_bytes for profile in profiles])
    rate_bps = known.rates.correct(known.drawn(run), names)
    claimed_s = run.costs.required_flops(profiles) / speed[:, None]  # [K, N]
    required_bytes = run.costs.required_bytes(profiles)  # [K, N]
    return RoundProblem(
        problem=AllocationProblem(
            known.estimate.correct(claimed_s, names),
            payloads.bits[0] / rate_bps[:, None],
            required_bytes <= memory_bytes[:, None],
            memory_bytes=memory_bytes,
            required_memory_bytes=required_bytes.min(axis=0),
            device_names=names,
            constant_s=run.channel.constant_s,
            power_limited=_power_limited(run, rate_bps),
            in_turn=run.channel.uplink == "tdma",
            mode=known.wanted,
        ),
        rows=np.arange(len(profiles)),
        profiles=profiles,
        rate_bps=rate_bps,
        claimed_s=claimed_s,
        downlink_s=known.downlinks.of(names),
        required_bytes=required_bytes,
        memory_limit_bytes=known.memory_limit_bytes,
        without_backward=np.zeros(len(profiles), bool),
        schedules={},
        payloads=payloads,
        trains_all=np.zeros(len(profiles), bool),
    )


def _power_limited(
    run: RunStatement, rate_bps: Float64Array
) -> PowerLimitedUplink | None:
    """Return with which SNR devices send, where it rises as their shares fall."""
    if run.channel.uplink != "power-limited":
        return None
    return PowerLimitedUplink(full_band_snr(run.channel.bandwidth_hz, rate_bps))


def training_all(run: RunStatement, known: Known, stated: RoundProblem) -> RoundProblem:
    """Let devices train all blocks, whichever they return, where memory holds that."""
    if not run.train_all:
        return stated
    profiles, problem = stated.profiles, stated.problem
    memory_bytes = np.array([profile.memory_bytes for profile in profiles])
    speed = np.array([profile.flops_per_s for profile in profiles])
    costs = run.costs.joined([range(run.num_blocks)])
    whole_bytes = costs.required_bytes(profiles)[:, :1]  # [K, 1]
    chosen = ~known.one_block[:, None] & (whole_bytes <= memory_bytes[:, None])
    chosen &= whole_bytes < stated.memory_limit_bytes[:, None]
    whole_s = costs.required_flops(profiles)[:, :1] / speed[:, None]
    claimed_s = np.where(chosen, whole_s, stated.claimed_s)
    return replace(
        stated,
        problem=replace(
            problem, compute_s=known.estimate.correct(claimed_s, known.names)
        ),
        claimed_s=claimed_s,
        required_bytes=np.where(chosen, whole_bytes, stated.required_bytes),
        trains_all=chosen[:, 0],
    )


def together(run: RunStatement, known: Known, stated: RoundProblem) -> RoundProblem:
    """Let devices train several blocks each: for enough of each, or for all blocks."""
    problem, limit = stated.problem, stated.memory_limit_bytes
    windows = chosen_windows(run, known, problem, memory_limit_bytes=limit)
    if windows is not None:
        spans, mode, bound_s = *windows, math.inf
    else:
        chosen = chosen_spans(
            run,
            known,
            problem,
            rate_bps=stated.rate_bps,
            memory_limit_bytes=limit,
        )
        if chosen is None:
            return stated
        spans, bound_s = chosen
        if problem.in_turn:  # it bounds rounds in which devices share the band
            bound_s = math.nan
        mode = replace(problem.mode, blocks=tuple(spans), participation="needed")
    speed = np.array([profile.flops_per_s for profile in stated.profiles])
    flops, required_bytes = window_costs(run, known, spans)
    claimed_s = flops / speed[:, None]  # [K, N]
    memory_bytes = np.array([profile.memory_bytes for profile in stated.profiles])
    fits = required_bytes <= memory_bytes[:, None]
    problem = replace(
        problem,
        compute_s=known.estimate.correct(claimed_s, known.names),
        feasible=fits & ~beyond_one(run, known, spans),
        required_memory_bytes=required_bytes.min(axis=0),
        mode=mode,
    )
    joined = replace(
        stated,
        problem=problem,
        claimed_s=claimed_s,
        required_bytes=required_bytes,
        spans=spans,
        bound_s=bound_s,
    )
    return uploading(run, known, joined)


def reduced(run: RunStatement, known: Known, stated: RoundProblem) -> RoundProblem:
    """Let devices take blocks that are too much for them, by doing less."""
    if not run.reduced_schedules:
        return stated
    problem, schedules = with_reduced_schedules(
        stated.problem,
        run.costs,
        flops=run.costs.required_flops(stated.profiles),
        whole=known.one_block,
        latency_target_s=run.latency_target_s,
    )
    return replace(stated, problem=problem, schedules=schedules)


def without_backward(
    run: RunStatement, known: Known, stated: RoundProblem
) -> RoundProblem:
    """Choose who trains by forward passes alone.

    Nobody who had better not be asked is counted on where devices suffice otherwise.
    """
    problem, chosen = mix(
        stated.problem,
        run.zeroth_order,
        stated.profiles,
        rate_bps=stated.rate_bps,
        estimate=known.estimate,
        unasked=_spared(run, known, stated, stated.memory_limit_bytes),
    )
    return replace(stated, problem=problem, without_backward=chosen)


def charged(run: RunStatement, stated: RoundProblem) -> RoundProblem:
    """Claim time and memory of what each device is to do, where that is not all."""
    claimed_s, required_bytes = stated.claimed_s.copy(), stated.required_bytes.copy()
    speed = np.array([profile.flops_per_s for profile in stated.profiles])
    for (row, block), operations in stated.schedules.items():
        flops, memory_bytes = reduced_costs(run.costs, block, operations)
        claimed_s[row, block] = flops / speed[row]
        required_bytes[row, block] = memory_bytes
    if run.zeroth_order is not None:
        costs, rows = run.zeroth_order.costs, stated.without_backward
        claimed_s[rows] = costs.flops[None, :] / speed[rows, None]
        required_bytes[rows] = costs.memory_bytes
    return replace(stated, claimed_s=claimed_s, required_bytes=required_bytes)


def powered(stated: RoundProblem) -> RoundProblem:
    """State what devices' parts take of their batteries, where any says what it draws.

    The computation alone: a device draws nothing that counts while it waits for its
    message, with which the times to compute begin later on.
    """
    compute_w, transmit_w = (
        np.array([np.nan if power is None else power for power in powers], np.float64)
        for powers in (
            [profile.compute_power_w for profile in stated.profiles],
            [profile.transmit_power_w for profile in stated.profiles],
        )
    )
    if np.isnan(compute_w + transmit_w).all():
        return stated
    problem = stated.problem
    energy = EnergyCosts.of_powers(problem.compute_s, compute_w, transmit_w)
    return replace(stated, problem=replace(problem, energy=energy))


def bounded(run: RunStatement, known: Known, stated: RoundProblem) -> RoundProblem:
    """Leave out who gave too many of a block's latest updates, where others suffice."""
    problem = stated.problem
    able = problem.feasible & ~_spared(run, known, stated, stated.memory_limit_bytes)
    given = np.stack(
        [known.given[:, stated.blocks(b)].max(axis=1) for b in range(run.num_blocks)], 1
    )
    beyond = beyond_part(given, able, run.allocation.influence_factor)
    if problem.all_devices or not beyond.any():
        return stated
    left = replace(problem, feasible=able & ~beyond)
    if known.worth is None:
        suffices = is_feasible(left)
    else:
        suffices = any(
            fits_any_block(p, run.latency_target_s)
            for p in heard_by_some(left, stated.broadcast)
        )
    if not suffices:
        return stated
    return replace(
        stated, problem=replace(problem, feasible=problem.feasible & ~beyond)
    )


def in_time(run: RunStatement, known: Known, stated: RoundProblem) -> RoundProblem:
    """Keep the most valuable blocks that a round can finish within the target.

    Nobody who rests is counted on, unless no block can be trained in time else.

    Raises
    ------
    InfeasibleAllocation
        Not even one can.
    """
    worth = known.worth
    if worth is None:
        return stated

    def counted_on(count: int) -> list[AllocationProblem]:
        """Return the problems in which so many of those who rest are back."""
        limit = lifted(stated.memory_limit_bytes, known.failures, count)
        able = stated.problem.feasible & ~_spared(run, known, stated, limit)
        return heard_by_some(replace(stated.problem, feasible=able), stated.broadcast)

    def suffice(count: int) -> bool:
        return any(fits_any_block(p, run.latency_target_s) for p in counted_on(count))

    resting = int(np.isfinite(stated.memory_limit_bytes).sum())
    back = bisect_left(range(resting), True, key=suffice)
    problems = (
        counted_on(back)
        if suffice(back)
        else heard_by_some(stated.problem, stated.broadcast)
    )
    fitting = [p for p in problems if fits_any_block(p, run.latency_target_s)]
    choices = [
        choose_blocks(p, worth, latency_target_s=run.latency_target_s)
        # Where none fits, the error says why.
        for p in fitting or problems[-1:]
    ]
    chosen = max(choices, key=lambda choice: worth[list(choice.blocks)].sum())
    return replace(
        stated,
        problem=replace(
            stated.problem, mode=replace(stated.problem.mode, blocks=chosen.blocks)
        ),
        memory_limit_bytes=lifted(stated.memory_limit_bytes, known.failures, back),
        worth_gap=chosen.gap,
    )


def uploading(run: RunStatement, known: Known, stated: RoundProblem) -> RoundProblem:
    """Let the blocks that are trained take the times that their payloads take."""
    spans = stated.spans.values()
    payloads = run.payloads(known.server_round, stated.trained, spans)
    full_band_upload_s = np.where(
        stated.without_backward[:, None],
        stated.problem.full_band_upload_s,
        payloads.bits[0] / stated.rate_bps[:, None],
    )  # [K, N]
    problem = replace(stated.problem, full_band_upload_s=full_band_upload_s)
    return replace(stated, problem=problem, payloads=payloads)


def asked(run: RunStatement, known: Known, stated: RoundProblem) -> RoundProblem:
    """Leave out whom a round had better not ask, and what is too much for the rest."""
    rows, problem = narrowed(
        stated.problem,
        longest_s=_longest_s(run, known),
        required_bytes=stated.required_bytes,
        memory_limit_bytes=stated.memory_limit_bytes,
        failures=known.failures,
        block_updates=known.block_updates,
        partial=known.partial or rotates(stated.problem),
        wait_s=alone_s(stated.broadcast),
    )
    return stated.of_rows(rows, problem)


def _longest_s(run: RunStatement, known: Known) -> float:
    """Return what a device may take for a block, had it the whole band to itself."""
    longest_s = run.allocation.longest_round_s
    if known.usual_round_s is None:
        return longest_s
    return min(longest_s, _TIMES_USUAL * known.usual_round_s)


def _spared(
    run: RunStatement, known: Known, stated: RoundProblem, limit: Float64Array
) -> BoolArray:
    """Tell which pairs of device and block had better not be asked, shape [K, N]."""
    return spared(
        stated.problem,
        longest_s=_longest_s(run, known),
        required_bytes=stated.required_bytes,
        memory_limit_bytes=limit,
        wait_s=alone_s(stated.broadcast),
    )
