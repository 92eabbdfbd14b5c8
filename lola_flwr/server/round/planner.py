"""Plan one round: choose blocks and devices, give out blocks, bandwidth and codecs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from lola_flwr.allocation import (
    RANDOM_ALLOCATORS,
    Allocation,
    AllocationProblem,
    Allocator,
    InfeasibleAllocation,
    RoundMode,
    allocate,
    find_allocator,
    refine_payloads,
    rotate,
)
from lola_flwr.errors import UserError
from lola_flwr.randomness import rng_for
from lola_flwr.server.fleet import Fleet
from lola_flwr.server.model import ServedModel
from lola_flwr.server.round.candidates import lifted, narrowed, spared
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.server.round.problem import ProblemStatement, RoundProblem
from lola_flwr.server.selection.chooser import BlockChooser
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.wire.payload import Payloads
from lola_flwr.wire.records import Assignment
from lola_flwr.zeroth_order.mixing import BoolArray, FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundPlanner:
    """How a run's rounds are planned.

    Parameters
    ----------
    statement
        States each round's problem.
    allocator
        Solves it.
    low_rank
        How devices project their gradients; None: they do not.
    rotation_eps, batch_size, longest_round_s, codec_slack
        As in `lola_flwr.server.coordinator.Coordinator`.

    Raises
    ------
    UserError
        Unknown name of an allocator, or negative ``codec_slack``.
    """

    statement: ProblemStatement
    allocator: str | Allocator
    low_rank: LowRankProjection | None
    rotation_eps: float
    batch_size: int
    longest_round_s: float
    codec_slack: float

    def __post_init__(self) -> None:
        """Check now what would else be an error in round 1."""
        if isinstance(self.allocator, str):
            find_allocator(self.allocator)
        if not self.codec_slack >= 0:
            raise UserError(f"codec_slack={self.codec_slack} must be at least 0.")

    def plan(
        self,
        server_round: int,
        device_ids: Iterable[str],
        *,
        fleet: Fleet,
        model: ServedModel,
        chooser: BlockChooser,
        partial: bool,
    ) -> RoundPlan:
        """Draw the channel, and give out blocks and bandwidth.

        Parameters
        ----------
        server_round
            Round, from 1.
        device_ids
            Devices that are there; those without a known profile are left out.
        fleet
            What is known of devices.
        model
            What they are sent.
        chooser
            Chooses the blocks; it may take note of what it measures.
        partial
            Whether blocks may be left out that there is no device for.

        Raises
        ------
        InfeasibleAllocation
            The devices cannot compute all blocks, or none has a usable profile.
        """
        known = fleet.known(device_ids)
        if not known:
            raise InfeasibleAllocation(
                "No device has reported a usable profile; see the warnings above."
            )
        able, stated, payloads = self._stated(
            server_round, known, fleet, model, chooser, partial
        )
        profiles = {device: fleet.profiles[device] for device in able}
        allocation = self._allocate(
            server_round, stated.problem, fleet, [p.name for p in profiles.values()]
        )
        problem, allocation, codec_level = refine_payloads(
            stated.problem,
            allocation,
            payloads.bits,
            slack=self.codec_slack,
            fixed=stated.without_backward,
        )
        allocation.check(problem)
        active = {
            able[row]: (row, block)
            for row, block in enumerate(allocation.block_of_device)
            if block >= 0
        }
        # All but the assignments, which follow from the rest.
        plan = RoundPlan(
            server_round=server_round,
            device_ids=tuple(able),
            profiles=profiles,
            num_excluded=len(known) - len(able),
            problem=problem,
            allocation=allocation,
            assignments={},
            claimed_s={d: float(stated.claimed_s[pair]) for d, pair in active.items()},
            payloads=payloads,
            codec_level=codec_level,
            manifests=fleet.manifests(active, model),
        )
        return replace(plan, assignments=self._assignments(plan, stated, model))

    def _stated(
        self,
        server_round: int,
        known: Sequence[str],
        fleet: Fleet,
        model: ServedModel,
        chooser: BlockChooser,
        partial: bool,
    ) -> tuple[list[str], RoundProblem, Payloads]:
        """Return the devices that can be asked, their problem, and what they upload."""
        profiles = [fleet.profiles[device] for device in known]
        names = [profile.name for profile in profiles]
        failures = [fleet.absences.failures(name) for name in names]
        limits = np.array(
            [fleet.absences.memory_limit(server_round, name) for name in names]
        )

        def unasked(
            problem: AllocationProblem, required: FloatArray, count: int = 0
        ) -> BoolArray:
            return spared(
                problem,
                longest_s=self.longest_round_s,
                required_bytes=required,
                memory_limit_bytes=lifted(limits, failures, count),
            )

        stated = self.statement.of_round(
            server_round,
            profiles,
            estimate=fleet.estimate,
            rates=fleet.rates,
            wanted=lambda whole: chooser.wanted(whole, server_round, model.state()),
            unasked=unasked,
        )
        problem = stated.problem

        @cache
        def in_time(count: int) -> RoundMode | None:
            asked = ~unasked(problem, stated.required_bytes, count)
            able = replace(problem, feasible=problem.feasible & asked)
            try:
                return chooser.within_target(able, server_round)
            except InfeasibleAllocation:
                return None

        # Nobody who rests is counted on, unless no block can be trained in time else.
        resting = int(np.isfinite(limits).sum())
        back = bisect_left(
            range(resting), True, key=lambda count: in_time(count) is not None
        )
        mode = in_time(back) or chooser.within_target(problem, server_round)
        limits = lifted(limits, failures, back)
        stated = replace(stated, problem=replace(problem, mode=mode))
        stated, _ = self._with_payloads(server_round, stated)
        rows, problem = narrowed(
            stated.problem,
            longest_s=self.longest_round_s,
            required_bytes=stated.required_bytes,
            memory_limit_bytes=limits,
            failures=failures,
            block_updates=fleet.block_updates(self.statement.partition.num_blocks),
            partial=partial,
        )
        # Who sends the head depends on which blocks are trained after all.
        stated, payloads = self._with_payloads(
            server_round, stated.of_rows(rows, problem)
        )
        return [known[row] for row in rows], stated, payloads

    def _with_payloads(
        self, server_round: int, stated: RoundProblem
    ) -> tuple[RoundProblem, Payloads]:
        """Return the problem with the times that its blocks' payloads take."""
        trained = stated.problem.demand > 0
        payloads = self.statement.uplink.payloads(server_round, trained)
        return stated.uploading(payloads), payloads

    def _allocate(
        self,
        server_round: int,
        problem: AllocationProblem,
        fleet: Fleet,
        names: Sequence[str],
    ) -> Allocation:
        """Solve the problem, and let blocks meet other devices' data."""
        options: dict[str, Any] = {}
        if self.allocator in RANDOM_ALLOCATORS:
            rng = rng_for(self.statement.seed, "matching", server_round)
            options["seed"] = int(rng.integers(2**31))
        allocation = allocate(problem, self.allocator, **options)
        if self.rotation_eps > 0:
            meetings = fleet.meetings_of(names, self.statement.partition.num_blocks)
            allocation = rotate(problem, allocation, meetings, eps=self.rotation_eps)
        return allocation

    def _assignments(
        self, plan: RoundPlan, stated: RoundProblem, model: ServedModel
    ) -> dict[str, Assignment]:
        """Return what each active device of a plan is told."""
        upload_s = plan.allocation.upload_s(plan.problem)
        assignments = {}
        for row, device, block in plan.active():
            profile = plan.profiles[device]
            manifest = plan.manifests.get(device)
            sends_head = bool(plan.payloads.sends_head[block])
            fields: dict[str, Any] = {}
            if model.is_sent_whole:
                names = self.statement.partition.update_names(block, head=sends_head)
                fields["update_names"] = "\n".join(names)
                fields["frozen_names"] = "\n".join(self.statement.partition.frozen)
            if profile.uplink_bps is not None:
                # Only a link whose rate is known can be held to a part of it.
                payload_bits = (
                    plan.problem.full_band_upload_s[row, block] * stated.rate_bps[row]
                )
                fields["uplink_bps"] = float(payload_bits / upload_s[row])
            zeroth_order = self.statement.zeroth_order
            if zeroth_order is not None and stated.without_backward[row]:
                fields |= zeroth_order.directions_for(
                    self.statement.seed, plan.server_round, profile.name
                )
            if self.low_rank is not None:
                fields |= self.low_rank.assignment_fields()
            assignments[device] = Assignment(
                server_round=plan.server_round,
                block_index=block,
                share=float(plan.allocation.share[row]),
                batch_size=self.batch_size,
                codec=plan.payloads.codecs[plan.codec_level[row]],
                base_fingerprint=model.base_fingerprint,
                sends_head=sends_head,
                manifest=None if manifest is None else manifest.to_text(),
                memory_bytes=float(stated.required_bytes[row, block]),
                operations=stated.operations(row, block),
                **fields,
            )
        return assignments
