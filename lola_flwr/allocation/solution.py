"""The answer to an allocation problem, and the check of all that it promises."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lola_flwr.allocation.band import upload_s
from lola_flwr.allocation.in_turn import turns_s
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.errors import UserError


class InfeasibleAllocation(UserError):
    """No matching exists; the message says which blocks cannot be covered, and why."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Allocation:
    """Who computes which block this round, with which share of the band.

    Parameters
    ----------
    block_of_device
        Block index of each device, shape (K,); -1 for an idle device.
    share
        Share of the uplink band, shape (K,); 0 when idle; sums to at most 1. Where
        devices send in turn, what part of the round each has the band to itself.
    num_blocks
        N, the number of blocks of the model.
    round_s
        Round latency: the slowest device's compute and upload time, and its wait for
        its turn if it has one, plus the problem's constant, seconds.
    bound_s
        Proven lower bound on the best possible `round_s`, seconds; NaN if the solver
        gives none.
    iterations
        Iterations that the solver took, in its own unit; 0 where it has none.
    stop_reason
        Why the solver stopped: "optimal", "gap", "iterations", "time", "rotation",
        "sharing", "payloads" or "heuristic".
    bound_j
        Of an energy allocator: proven lower bound on what it minimises, joules; NaN of
        others.
    """

    block_of_device: IntArray
    share: Float64Array
    num_blocks: int
    round_s: float
    bound_s: float = math.nan
    iterations: int = 0
    stop_reason: str = "heuristic"
    bound_j: float = math.nan

    def __post_init__(self) -> None:
        """Make the arrays read-only."""
        for name, dtype in (("block_of_device", np.int64), ("share", np.float64)):
            array = np.asarray(getattr(self, name), dtype=dtype)
            array = array.copy() if array.flags.writeable else array
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def device_of_block(self) -> IntArray:
        """Lowest device index of each block, shape (N,); -1 if nobody computes it."""
        device_of_block = np.full(self.num_blocks, -1, dtype=np.int64)
        active = np.flatnonzero(self.block_of_device >= 0)[::-1]
        # Of repeated indices the last assignment stays: here the lowest device.
        device_of_block[self.block_of_device[active]] = active
        return device_of_block

    @property
    def gap(self) -> float:
        """How far the latency can be from the best one: round_s / bound_s - 1."""
        if self.round_s == self.bound_s:
            return 0.0
        return self.round_s / self.bound_s - 1.0 if self.bound_s else math.inf

    def upload_s(self, problem: AllocationProblem) -> Float64Array:
        """Upload time of each device at its share, seconds, shape (K,); 0 when idle."""
        seconds = np.zeros(self.share.size)
        active = np.flatnonzero(self.block_of_device >= 0)
        seconds[active] = upload_s(
            problem.full_band_upload_s[active, self.block_of_device[active]],
            1.0 if problem.in_turn else self.share[active],
            problem.snr_of(active),
        )
        return seconds

    def turn_s(self, problem: AllocationProblem) -> Float64Array:
        """Wait of each device for its turn, seconds, shape (K,); 0 without turns."""
        seconds = np.zeros(self.share.size)
        if problem.in_turn:
            active = np.flatnonzero(self.block_of_device >= 0)
            pairs = active, self.block_of_device[active]
            seconds[active] = turns_s(
                problem.compute_s[pairs], problem.full_band_upload_s[pairs]
            )
        return seconds

    def joules(self, problem: AllocationProblem) -> Float64Array:
        """Energy of each device, joules, shape (K,); 0 when idle, NaN if not known."""
        joules = np.zeros(self.share.size)
        active = np.flatnonzero(self.block_of_device >= 0)
        energy = problem.energy
        if energy is None:
            joules[active] = math.nan
            return joules
        joules[active] = (
            energy.compute_j[active, self.block_of_device[active]]
            + energy.transmit_w[active] * self.upload_s(problem)[active]
        )
        return joules

    def check(self, problem: AllocationProblem, *, rel_tol: float = 1e-9) -> None:
        """Recompute every constraint from scratch.

        Parameters
        ----------
        problem
            The problem that this is an answer to, with the same `RoundMode`.
        rel_tol
            Relative tolerance on the latency and on the sum of the shares.

        Raises
        ------
        ValueError
            On the first constraint that does not hold, naming the device or block.
        """
        num_devices = problem.num_devices
        if not (
            self.block_of_device.shape == self.share.shape == (num_devices,)
            and self.num_blocks == problem.num_blocks
        ):
            raise ValueError(
                f"Shape mismatch: the problem has {num_devices} devices and "
                f"{problem.num_blocks} blocks, the allocation "
                f"block_of_device{list(self.block_of_device.shape)}, "
                f"share{list(self.share.shape)} and {self.num_blocks} blocks."
            )
        active = np.flatnonzero(self.block_of_device != -1)
        blocks = self.block_of_device[active]
        _check_cover(problem, active, blocks)
        total = float(self.share.sum())
        # A NaN share fails both comparisons.
        if not (np.all(self.share >= 0.0) and total <= 1.0 + rel_tol):
            raise ValueError(
                f"Shares must be at least 0 and sum to at most 1: sum={total!r}, "
                f"smallest={float(self.share.min())!r}."
            )
        spent_idle = np.flatnonzero((self.block_of_device == -1) & (self.share > 0.0))
        if spent_idle.size:
            device = int(spent_idle[0])
            raise ValueError(
                f"Idle device has bandwidth: share[{device}]={self.share[device]}."
            )
        sent_s = self.turn_s(problem) + self.upload_s(problem)
        finish_s = problem.compute_s[active, blocks] + sent_s[active]
        slowest = int(np.argmax(finish_s))
        round_s = problem.constant_s + float(finish_s[slowest])
        if not math.isclose(round_s, self.round_s, rel_tol=rel_tol):
            raise ValueError(
                f"Latency is wrong: round_s={self.round_s!r} s, but device "
                f"{active[slowest]} on block {blocks[slowest]} ends the round at "
                f"{round_s!r} s."
            )
        if self.bound_s > self.round_s * (1.0 + rel_tol):
            raise ValueError(
                f"Bound is wrong: bound_s={self.bound_s!r} s is above "
                f"round_s={self.round_s!r} s."
            )


def _check_cover(
    problem: AllocationProblem, devices: IntArray, blocks: IntArray
) -> None:
    """Every block has the devices it needs, no more, and all of them can do it."""
    outside = np.flatnonzero((blocks < 0) | (blocks >= problem.num_blocks))
    if outside.size:
        raise ValueError(
            f"Unknown block: device {devices[outside[0]]} has block "
            f"{blocks[outside[0]]} of {problem.num_blocks}."
        )
    impossible = np.flatnonzero(~problem.feasible[devices, blocks])
    if impossible.size:
        device, block = devices[impossible[0]], blocks[impossible[0]]
        raise ValueError(
            f"Device {device} cannot compute block {block}: feasible is False, or its "
            "latency is infinite."
        )
    demand = problem.demand
    count = np.bincount(blocks, minlength=problem.num_blocks)
    for block in np.flatnonzero((count < demand) | ((demand == 0) & (count > 0))):
        raise ValueError(
            f"Block {block} has {count[block]} devices but needs {demand[block]}."
        )
    spare = int((count - demand).sum())
    if problem.all_devices:
        if devices.size < problem.num_devices:
            idle = np.setdiff1d(np.arange(problem.num_devices), devices)[0]
            raise ValueError(f"Device {idle} is idle, but all devices must take part.")
    elif spare > problem.mode.backups:
        raise ValueError(
            f"{spare} devices more than the blocks need, but "
            f"backups={problem.mode.backups}."
        )
