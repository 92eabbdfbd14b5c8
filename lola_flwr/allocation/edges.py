"""The devices x blocks graph of one round, in the form that the solvers work on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lola_flwr.allocation.band import least_share, upload_s
from lola_flwr.allocation.problem import AllocationProblem
from lola_flwr.arrays import BoolArray, Float64Array, IntArray


@dataclass(frozen=True, eq=False, slots=True)
class Edges:
    """Costs of the round's (device, block) pairs, perhaps for some devices only.

    Rows are `devices`, columns are `blocks`, both in rising order; k and n below count
    them. Impossible pairs have an infinite `compute_s`.
    """

    devices: IntArray  # [k] device index
    blocks: IntArray  # [n] block index, deepest first
    demand: IntArray  # [n] devices that each block needs
    compute_s: Float64Array  # [k, n]
    full_band_upload_s: Float64Array  # [k, n]
    snr: Float64Array | None  # [k, 1]
    all_devices: bool

    @property
    def possible(self) -> BoolArray:
        """Whether a device could ever finish a block, shape (k, n)."""
        return np.isfinite(self.compute_s)

    def latency_s(self, share: float) -> Float64Array:
        """Latency of each edge if its device had this share, seconds, shape (k, n)."""
        return self.compute_s + upload_s(self.full_band_upload_s, share, self.snr)

    def least_share(self, deadline_s: float) -> Float64Array:
        """Least share that meets a deadline, capped at 1, shape (k, n)."""
        return least_share(
            self.full_band_upload_s, deadline_s - self.compute_s, self.snr
        )


def edges_of(
    problem: AllocationProblem, devices: IntArray | slice = slice(None)
) -> Edges:
    """Edges of the round's blocks to the given devices (default: to all of them)."""
    demand = problem.demand
    blocks = np.flatnonzero(demand)
    feasible = problem.feasible[devices]
    compute_s = problem.compute_s[devices]
    upload = problem.full_band_upload_s[devices]
    if not feasible.all():
        compute_s = np.where(feasible, compute_s, np.inf)
        # An impossible pair's upload time may be infinite; it must not make inf - inf.
        upload = np.where(feasible, upload, 0.0)
    if blocks.size < problem.num_blocks:
        compute_s, upload, demand = (
            compute_s[:, blocks],
            upload[:, blocks],
            demand[blocks],
        )
    snr = problem.snr_of(devices)
    if isinstance(devices, slice):
        devices = np.arange(*devices.indices(problem.num_devices))
    return Edges(
        devices=devices,
        blocks=blocks,
        demand=demand,
        compute_s=compute_s,
        full_band_upload_s=upload,
        snr=None if snr is None else snr[:, np.newaxis],
        all_devices=problem.all_devices,
    )
