"""A round's problem, with all that it assumes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from lola_flwr.allocation import AllocationProblem, Broadcast
from lola_flwr.arrays import BoolArray, Float64Array, IntArray
from lola_flwr.d2ft.operations import to_text
from lola_flwr.d2ft.rescue import Schedules
from lola_flwr.planning.spans import Spans
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.payload import Payloads


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
    downlink_s
        Time that each device takes to have its message, which the times to compute in
        ``problem`` begin with in the end, shape [k]; without that of a broadcast.
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
    trains_all
        Who trains all blocks, whichever it returns, shape [k].
    spans
        Blocks that one device trains together, by the first of them: where there are
        fewer devices than blocks, or several are to return each. All else has their
        costs at the first.
    bound_s
        No other spans allow a shorter round than this; NaN: that is not known.
    broadcast
        What a broadcast brings to whom, before which nobody begins; None without one.
    worth_gap
        As ``gap`` in `lola_flwr.planning.latency_target.ChosenBlocks`.
    """

    problem: AllocationProblem
    rows: IntArray
    profiles: tuple[DeviceProfile, ...]
    rate_bps: Float64Array
    claimed_s: Float64Array
    downlink_s: Float64Array
    required_bytes: Float64Array
    memory_limit_bytes: Float64Array
    without_backward: BoolArray
    schedules: Schedules
    payloads: Payloads
    trains_all: BoolArray
    spans: Spans = field(default_factory=dict)
    bound_s: float = math.inf
    broadcast: Broadcast | None = None
    worth_gap: float | None = None

    def blocks(self, first: int) -> tuple[int, ...]:
        """Return the blocks that a device trains that is given one: itself, mostly."""
        return self.spans.get(first, (first,))

    @property
    def trained(self) -> BoolArray:
        """Tell which blocks the round trains, shape [N]."""
        trained = self.problem.demand > 0
        for first in np.flatnonzero(trained):
            trained[list(self.blocks(int(first)))] = True
        return trained

    def operations(self, row: int, block: int) -> str | None:
        """Return what an assignment says about the layers; None: all run."""
        if self.without_backward[row] or (row, block) not in self.schedules:
            return None
        return to_text(self.schedules[row, block])

    def of_rows(self, rows: IntArray, problem: AllocationProblem) -> RoundProblem:
        """Return what is assumed of some of the devices, with the problem for these."""
        place = {int(row): n for n, row in enumerate(rows)}
        return replace(
            self,
            problem=problem,
            rows=self.rows[rows],
            profiles=tuple(self.profiles[row] for row in rows),
            rate_bps=self.rate_bps[rows],
            claimed_s=self.claimed_s[rows],
            downlink_s=self.downlink_s[rows],
            required_bytes=self.required_bytes[rows],
            memory_limit_bytes=self.memory_limit_bytes[rows],
            without_backward=self.without_backward[rows],
            schedules={
                (place[row], block): operations
                for (row, block), operations in self.schedules.items()
                if row in place
            },
            trains_all=self.trains_all[rows],
            broadcast=(
                None if self.broadcast is None else self.broadcast.of_rows(rows)
            ),
        )
