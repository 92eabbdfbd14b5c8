"""State a round's problem: what which block costs which device, and what is asked.

A chain of stages, each a function from frozen values to frozen values: from what a run
has in common and what is known before a round to a problem that can be solved.
`stated_round` is the chain; a run, `lola-flwr plan` and the figures go through it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from lola_flwr.allocation import (
    AllocationProblem,
    Allocator,
    InfeasibleAllocation,
    RoundMode,
    find_allocator,
)
from lola_flwr.allocation.problem import IntArray
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.d2ft.operations import to_text
from lola_flwr.d2ft.reduced import reduced_costs
from lola_flwr.d2ft.rescue import Schedules, with_reduced_schedules
from lola_flwr.errors import UserError
from lola_flwr.planning.candidates import lifted, narrowed, spared
from lola_flwr.planning.latency_target import most_valuable_blocks
from lola_flwr.system.channel import Channel, uplink_rates_bps
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.estimation import ComputeEstimate, RateEstimate
from lola_flwr.wire.payload import Payloads, UpdateSizes
from lola_flwr.zeroth_order.mixing import BoolArray, FloatArray, ZerothOrder, mix


@dataclass(frozen=True, kw_only=True)
class AllocationOptions:
    """How blocks, bandwidth and codecs are given out.

    Parameters
    ----------
    allocator
        Name of an allocator, ``"package.module:function"``, or a function from problem
        to allocation.
    mode
        Which blocks need how many devices (default: every block one).
    rotation_eps
        Relative latency that may be given up for letting blocks meet other devices'
        data; 0 turns rotation off.
    codec_slack
        Where devices have codecs to choose from: relative latency that may be given up
        for finer ones than the coarsest; see `lola_flwr.allocation.codec_levels`.
    longest_round_s
        A device that would need longer for a block, had it the whole band to itself, is
        not given that block.

    Raises
    ------
    UserError
        Unknown name of an allocator, or negative ``codec_slack``.
    """

    allocator: str | Allocator = "exact"
    mode: RoundMode = RoundMode()  # noqa: RUF009 (frozen)
    rotation_eps: float = 0.0
    codec_slack: float = 0.1
    longest_round_s: float = 3600.0

    def __post_init__(self) -> None:
        """Check now what would else be an error in round 1."""
        if isinstance(self.allocator, str):
            find_allocator(self.allocator)
        if not self.codec_slack >= 0:
            raise UserError(f"codec_slack={self.codec_slack} must be at least 0.")


@dataclass(frozen=True, kw_only=True, eq=False)
class RunStatement:
    """What the problems of a run's rounds have in common.

    Parameters
    ----------
    costs
        What each of the N blocks costs a device.
    sizes
        How large updates are; None: as ``costs`` says, in one codec, and with the
        head's gradient in every one.
    channel
        What the devices share.
    allocation
        How blocks and bandwidth are given out.
    zeroth_order
        How devices without the memory for back-propagation are used; None: not at all.
    reduced_schedules
        Whether devices may do less than a block takes.
    latency_target_s
        Time that a round may take, seconds.
    seed
        Seed of the run: the channel and random allocators follow from it.
    """

    costs: BlockCosts
    sizes: UpdateSizes | None = None
    channel: Channel = Channel()  # noqa: RUF009 (frozen)
    allocation: AllocationOptions = AllocationOptions()
    zeroth_order: ZerothOrder | None = None
    reduced_schedules: bool = False
    latency_target_s: float = math.inf
    seed: int = 0

    @property
    def num_blocks(self) -> int:
        """Number of blocks N."""
        return self.costs.flops.size

    def payloads(self, server_round: int, trained: BoolArray) -> Payloads:
        """Return what devices may upload in a round that trains some blocks, [N]."""
        if self.sizes is None:
            return Payloads(("",), self.costs.payload_bits[None, :], trained)
        return self.sizes.payloads(server_round, trained)


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What is known before a round, of K devices and N blocks.

    Parameters
    ----------
    server_round
        Round, from 1.
    profiles
        What the devices say of themselves.
    estimate, rates
        Correct what they claim of their processors and links.
    memory_limit_bytes
        Below how much memory each device's blocks had better stay, for it failed
        lately, shape [K]; infinite for devices without failures, 0 for those that rest
        altogether.
    failures
        How often each device failed, [K].
    meetings
        How often each device's update of each block was accepted, shape [K, N].
    wanted
        Which blocks are to be trained, and by how many devices each.
    worth
        What each block is worth, shape [N], where only those are trained that fit the
        latency target; None: all that are wanted.
    block_updates
        Updates that each block has had, shape [N].
    partial
        Whether blocks may be left out that there is no device for.
    """

    server_round: int
    profiles: tuple[DeviceProfile, ...]
    estimate: ComputeEstimate = field(default_factory=ComputeEstimate)
    rates: RateEstimate = field(default_factory=RateEstimate)
    memory_limit_bytes: FloatArray
    failures: tuple[int, ...]
    meetings: IntArray
    wanted: RoundMode
    worth: FloatArray | None = None
    block_updates: IntArray
    partial: bool = False

    @classmethod
    def at_first(
        cls, run: RunStatement, profiles: Sequence[DeviceProfile], server_round: int = 1
    ) -> Known:
        """Return what is known before any round: what the devices claim."""
        return cls(
            server_round=server_round,
            profiles=tuple(profiles),
            memory_limit_bytes=np.full(len(profiles), np.inf),
            failures=(0,) * len(profiles),
            meetings=np.zeros((len(profiles), run.num_blocks), np.int64),
            wanted=run.allocation.mode,
            block_updates=np.zeros(run.num_blocks, np.int64),
        )

    @property
    def names(self) -> list[str]:
        """Names of the devices."""
        return [profile.name for profile in self.profiles]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundProblem:
    """A round's problem, and what it assumes of the devices that are left of it.

    Parameters
    ----------
    problem
        What there is to solve, for k devices and N blocks.
    rows
        Which of the devices that are known these are, rising, shape [k].
    profiles
        Their profiles.
    rate_bps
        Rate of each device over the whole band, bit/s, shape [k].
    claimed_s
        Time that each device takes to compute each block by its profile alone, which
        ``problem`` has corrected, shape [k, N].
    required_bytes
        Memory that each device takes for each block, shape [k, N].
    memory_limit_bytes
        As in `Known`, of these devices, and without those that have to be asked.
    without_backward
        Who is to train by forward passes alone, shape [k].
    schedules
        What the layers are to do, where a device is to do less than all.
    payloads
        What devices may be told to upload.
    """

    problem: AllocationProblem
    rows: IntArray
    profiles: tuple[DeviceProfile, ...]
    rate_bps: FloatArray
    claimed_s: FloatArray
    required_bytes: FloatArray
    memory_limit_bytes: FloatArray
    without_backward: BoolArray
    schedules: Schedules
    payloads: Payloads

    def operations(self, row: int, block: int) -> str | None:
        """Return what an assignment says about the layers; None: all run."""
        if self.without_backward[row] or (row, block) not in self.schedules:
            return None
        return to_text(self.schedules[row, block])

    def of_rows(self, rows: IntArray, problem: AllocationProblem) -> RoundProblem:
        """Return what is assumed of some of the devices, with the problem for these."""
        place = {int(row): n for n, row in enumerate(rows)}
        return RoundProblem(
            problem=problem,
            rows=self.rows[rows],
            profiles=tuple(self.profiles[row] for row in rows),
            rate_bps=self.rate_bps[rows],
            claimed_s=self.claimed_s[rows],
            required_bytes=self.required_bytes[rows],
            memory_limit_bytes=self.memory_limit_bytes[rows],
            without_backward=self.without_backward[rows],
            schedules={
                (place[row], block): operations
                for (row, block), operations in self.schedules.items()
                if row in place
            },
            payloads=self.payloads,
        )


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
    stated = reduced(run, stated)
    stated = without_backward(run, known, stated)
    stated = charged(run, stated)
    stated = in_time(run, known, stated)
    stated = uploading(run, known, stated)
    stated = asked(run, known, stated)
    # Who sends the head depends on which blocks are trained after all.
    return uploading(run, known, stated)


def claimed(run: RunStatement, known: Known) -> RoundProblem:
    """State the problem by profiles, costs and channel, corrected by what was seen."""
    profiles, names = known.profiles, known.names
    every_block = np.ones(run.num_blocks, bool)
    payloads = run.payloads(known.server_round, every_block)
    speed = np.array([profile.flops_per_s for profile in profiles])
    memory_bytes = np.array([profile.memory_bytes for profile in profiles])
    rate_bps = known.rates.correct(
        uplink_rates_bps(
            profiles,
            bandwidth_hz=run.channel.bandwidth_hz,
            server_round=known.server_round,
            seed=run.seed,
            fading=run.channel.fading,
        ),
        names,
    )
    claimed_s = run.costs.flops[None, :] / speed[:, None]  # [K, N]
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
            mode=known.wanted,
        ),
        rows=np.arange(len(profiles)),
        profiles=profiles,
        rate_bps=rate_bps,
        claimed_s=claimed_s,
        required_bytes=required_bytes,
        memory_limit_bytes=known.memory_limit_bytes,
        without_backward=np.zeros(len(profiles), bool),
        schedules={},
        payloads=payloads,
    )


def reduced(run: RunStatement, stated: RoundProblem) -> RoundProblem:
    """Let devices take blocks that are too much for them, by doing less."""
    if not run.reduced_schedules:
        return stated
    problem, schedules = with_reduced_schedules(
        stated.problem, run.costs, latency_target_s=run.latency_target_s
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
        unasked=_spared(run, stated, stated.memory_limit_bytes),
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

    def chosen(problem: AllocationProblem) -> RoundMode:
        blocks = most_valuable_blocks(
            problem, worth, latency_target_s=run.latency_target_s
        )
        return replace(problem.mode, blocks=blocks)

    @cache
    def with_back(count: int) -> RoundMode | None:
        limit = lifted(stated.memory_limit_bytes, known.failures, count)
        able = stated.problem.feasible & ~_spared(run, stated, limit)
        try:
            return chosen(replace(stated.problem, feasible=able))
        except InfeasibleAllocation:
            return None

    resting = int(np.isfinite(stated.memory_limit_bytes).sum())
    back = bisect_left(
        range(resting), True, key=lambda count: with_back(count) is not None
    )
    mode = with_back(back) or chosen(stated.problem)
    return replace(
        stated,
        problem=replace(stated.problem, mode=mode),
        memory_limit_bytes=lifted(stated.memory_limit_bytes, known.failures, back),
    )


def uploading(run: RunStatement, known: Known, stated: RoundProblem) -> RoundProblem:
    """Let the blocks that are trained take the times that their payloads take."""
    payloads = run.payloads(known.server_round, stated.problem.demand > 0)
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
        longest_s=run.allocation.longest_round_s,
        required_bytes=stated.required_bytes,
        memory_limit_bytes=stated.memory_limit_bytes,
        failures=known.failures,
        block_updates=known.block_updates,
        partial=known.partial,
    )
    return stated.of_rows(rows, problem)


def _spared(run: RunStatement, stated: RoundProblem, limit: FloatArray) -> BoolArray:
    """Tell which pairs of device and block had better not be asked, shape [K, N]."""
    return spared(
        stated.problem,
        longest_s=run.allocation.longest_round_s,
        required_bytes=stated.required_bytes,
        memory_limit_bytes=limit,
    )
