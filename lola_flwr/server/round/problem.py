"""State the problem of one round: what which block costs which device.

Costs of the blocks, the devices' profiles, the channel, and what was observed of both
go in; what comes out can be narrowed and solved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lola_flwr.allocation import AllocationProblem, RoundMode
from lola_flwr.allocation.problem import IntArray
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.d2ft.operations import to_text
from lola_flwr.d2ft.reduced import reduced_costs
from lola_flwr.d2ft.rescue import Schedules, with_reduced_schedules
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.system.channel import uplink_rates_bps
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.estimation import ComputeEstimate, RateEstimate
from lola_flwr.wire.payload import Payloads, Uplink
from lola_flwr.zeroth_order.mixing import BoolArray, FloatArray, ZerothOrder, mix


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundProblem:
    """A round's problem, and what it assumes of the K devices and N blocks.

    Parameters
    ----------
    problem
        What there is to solve.
    rate_bps
        Rate of each device over the whole band, bit/s, shape [K].
    claimed_s
        Time that each device takes to compute each block by its profile alone, which
        ``problem`` has corrected, shape [K, N].
    required_bytes
        Memory that each device takes for each block, shape [K, N].
    without_backward
        Who is to train by forward passes alone, shape [K].
    schedules
        What the layers are to do, where a device is to do less than all.
    """

    problem: AllocationProblem
    rate_bps: FloatArray
    claimed_s: FloatArray
    required_bytes: FloatArray
    without_backward: BoolArray
    schedules: Schedules

    def operations(self, row: int, block: int) -> str | None:
        """Return what an assignment says about the layers; None: all run."""
        if self.without_backward[row] or (row, block) not in self.schedules:
            return None
        return to_text(self.schedules[row, block])

    def uploading(self, payloads: Payloads) -> RoundProblem:
        """Return the problem with the times that these payloads take."""
        upload_s = np.where(
            self.without_backward[:, None],
            self.problem.full_band_upload_s,
            payloads.bits[0] / self.rate_bps[:, None],
        )  # [K, N]
        return replace(self, problem=replace(self.problem, full_band_upload_s=upload_s))

    def of_rows(self, rows: IntArray, problem: AllocationProblem) -> RoundProblem:
        """Return what is assumed of some devices, with the problem for these."""
        place = {int(row): n for n, row in enumerate(rows)}
        return RoundProblem(
            problem=problem,
            rate_bps=self.rate_bps[rows],
            claimed_s=self.claimed_s[rows],
            required_bytes=self.required_bytes[rows],
            without_backward=self.without_backward[rows],
            schedules={
                (place[row], block): operations
                for (row, block), operations in self.schedules.items()
                if row in place
            },
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ProblemStatement:
    """What the problems of a run's rounds have in common.

    Parameters
    ----------
    partition
        Blocks of the model.
    costs
        What each block costs a device.
    uplink
        What devices upload.
    bandwidth_hz
        Total uplink bandwidth.
    mode
        Which blocks need how many devices.
    zeroth_order
        How devices without the memory for back-propagation are used; None: not at all.
    reduced_schedules
        Whether devices may do less than a block takes.
    latency_target_s
        Time that a round may take, for reduced schedules, seconds.
    constant_s
        Constant part of every round, seconds.
    seed
        Seed of the run: the channel follows from it.
    """

    partition: BlockPartition
    costs: BlockCosts
    uplink: Uplink
    bandwidth_hz: float
    mode: RoundMode
    zeroth_order: ZerothOrder | None = None
    reduced_schedules: bool = False
    latency_target_s: float = math.inf
    constant_s: float = 0.0
    seed: int = 0

    def of_round(
        self,
        server_round: int,
        profiles: Sequence[DeviceProfile],
        *,
        estimate: ComputeEstimate,
        rates: RateEstimate,
        wanted: Callable[[AllocationProblem], AllocationProblem],
        unasked: Callable[[AllocationProblem, FloatArray], BoolArray],
    ) -> RoundProblem:
        """State the problem of the blocks that the mode names and a choice leaves.

        Parameters
        ----------
        server_round
            Round, from 1.
        profiles
            The K devices.
        estimate, rates
            Correct what they claim of their processors and links.
        wanted
            Narrows the problem of all blocks down to those that are to be trained. Who
            trains without back-propagation depends on these alone.
        unasked
            Tells, of a problem and the memory that its pairs take, which pairs had
            better not be asked [K, N]. They are still there in what is returned; but
            nobody counts on them where devices suffice without forward passes alone.
        """
        names = [profile.name for profile in profiles]
        every_block = np.ones(self.partition.num_blocks, bool)
        payloads = self.uplink.payloads(server_round, every_block)
        speed = np.array([profile.flops_per_s for profile in profiles])
        memory_bytes = np.array([profile.memory_bytes for profile in profiles])
        rate_bps = rates.correct(
            uplink_rates_bps(
                profiles,
                bandwidth_hz=self.bandwidth_hz,
                server_round=server_round,
                seed=self.seed,
            ),
            names,
        )
        claimed_s = self.costs.flops[None, :] / speed[:, None]  # [K, N]
        required_bytes = self.costs.required_bytes(profiles)  # [K, N]
        problem = AllocationProblem(
            estimate.correct(claimed_s, names),
            payloads.bits[0] / rate_bps[:, None],
            required_bytes <= memory_bytes[:, None],
            memory_bytes=memory_bytes,
            required_memory_bytes=required_bytes.min(axis=0),
            device_names=names,
            constant_s=self.constant_s,
            mode=self.mode,
        )
        problem = wanted(problem)
        schedules: Schedules = {}
        if self.reduced_schedules:
            problem, schedules = with_reduced_schedules(
                problem, self.costs, latency_target_s=self.latency_target_s
            )
        problem, without_backward = mix(
            problem,
            self.zeroth_order,
            profiles,
            rate_bps=rate_bps,
            correct=estimate.correct,
            unasked=unasked(problem, required_bytes),
        )
        for (row, block), operations in schedules.items():
            flops, memory = reduced_costs(self.costs, block, operations)
            claimed_s[row, block] = flops / speed[row]
            required_bytes[row, block] = memory
        if self.zeroth_order is not None:
            costs, rows = self.zeroth_order.costs, without_backward
            claimed_s[rows] = costs.flops[None, :] / speed[rows, None]
            required_bytes[rows] = costs.memory_bytes
        return RoundProblem(
            problem=problem,
            rate_bps=rate_bps,
            claimed_s=claimed_s,
            required_bytes=required_bytes,
            without_backward=without_backward,
            schedules=schedules,
        )
