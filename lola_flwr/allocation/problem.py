"""What is asked for: the costs of every (device, block) pair and who must take part.

Notation throughout the package: K devices, N blocks; block index 0 is nearest the
input, so the depth counted from the output is ``N - index``. All times are seconds,
shares of the uplink band and SNRs are dimensionless (linear, never dB).

References
----------
.. [1] Wu, Chen, Huang, "Resource Management for Low-latency Cooperative Fine-tuning of
   Foundation Models at the Network Edge", arXiv:2407.09873.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lola_flwr.allocation.band import PowerLimitedUplink
from lola_flwr.allocation.joules import EnergyCosts
from lola_flwr.arrays import BoolArray, Float64Array, IntArray
from lola_flwr.errors import UserError

Participation = Literal["needed", "all"]

# Sums and products of a few times below this stay far from overflow. No round waits
# 1e100 s, so such an edge is as impossible as an infinite one.
IMPOSSIBLE_S = 1e100


@dataclass(frozen=True)
class RoundMode:
    """Which blocks are trained this round, and by how many devices each.

    Parameters
    ----------
    blocks
        Block indices of this round; None means all of them.
    devices_per_block
        Devices that each of those blocks needs: one number, or one for every block of
        the model (0: not this round).
    participation
        "needed": exactly as many devices as the blocks need, the others idle (the
        paper's setting). "all": every device takes part in exactly one block, and
        each block has at least the devices it needs.
    backups
        Up to this many spare devices double the blocks that are hardest to finish, one
        each; see `lola_flwr.allocation.allocate`.

    Raises
    ------
    UserError
        If a field is out of range by itself. What depends on the number of blocks is
        checked by `AllocationProblem`.
    """

    blocks: Sequence[int] | None = None
    devices_per_block: int | Sequence[int] = 1
    participation: Participation = "needed"
    backups: int = 0

    def __post_init__(self) -> None:
        """Turn sequences into tuples of int and check the ranges."""
        if self.blocks is not None:
            blocks = tuple(int(block) for block in self.blocks)
            if not blocks or len(set(blocks)) != len(blocks):
                raise UserError(
                    f"blocks must name at least one block and none twice: {blocks}."
                )
            object.__setattr__(self, "blocks", blocks)
        if isinstance(self.devices_per_block, Sequence | np.ndarray):
            wanted = tuple(int(count) for count in self.devices_per_block)
            if min(wanted, default=0) < 0 or not any(wanted):
                raise UserError(
                    "devices_per_block must be counts, not all of them 0: "
                    f"{list(wanted)}."
                )
            object.__setattr__(self, "devices_per_block", wanted)
        elif self.devices_per_block < 1:
            raise UserError(
                f"devices_per_block must be at least 1, not {self.devices_per_block}."
            )
        if self.participation not in get_args(Participation):
            raise UserError(
                f"Unknown participation {self.participation!r}; use one of "
                f"{', '.join(get_args(Participation))}."
            )
        if self.backups < 0:
            raise UserError(f"backups must not be negative, but is {self.backups}.")
        if self.backups and self.participation == "all":
            raise UserError(
                f"backups={self.backups} needs spare devices, but with "
                "participation='all' there are none; drop one of the two."
            )

    def check(self, num_blocks: int) -> None:
        """Compare the mode with the model's number of blocks.

        Raises
        ------
        UserError
            It names blocks that there are not, or leaves nothing to train.
        """
        outside = [b for b in self.blocks or () if not 0 <= b < num_blocks]
        if outside:
            raise UserError(
                f"Unknown block: blocks names {outside[0]}, but the blocks are 0 to "
                f"{num_blocks - 1}."
            )
        wanted = self.devices_per_block
        if isinstance(wanted, Sequence) and len(wanted) != num_blocks:
            raise UserError(
                f"Shape mismatch: devices_per_block has {len(wanted)} counts, but "
                f"there are {num_blocks} blocks."
            )
        if not self.demand(num_blocks).any():
            raise UserError(
                "Nothing to train: devices_per_block is 0 for all of "
                f"blocks={self.blocks}."
            )

    def demand(self, num_blocks: int) -> IntArray:
        """Return how many devices each block needs, shape (N,); 0: left out."""
        demand = np.zeros(num_blocks, dtype=np.int64)
        chosen = slice(None) if self.blocks is None else list(self.blocks)
        wanted = np.asarray(self.devices_per_block)
        demand[chosen] = wanted[chosen] if wanted.ndim else wanted
        return demand


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """One round's allocation problem: who could compute what, and how fast.

    Nothing is solved here; the arrays are checked, copied and made read-only.

    Parameters
    ----------
    compute_s
        Computation latency c of each device on each block, seconds, shape (K, N).
        Infinite (or above 1e100 s) marks a pair that is impossible.
    full_band_upload_s
        Upload time tau of that block's payload over the whole band, seconds, shape
        (K, N); infinite as above, 0 where there is nothing to send.
    feasible
        Whether the device's memory holds that block's training step, shape (K, N);
        all True when omitted. Impossible pairs are stored as False.
    memory_bytes
        Memory each device offers, shape (K,); used only to explain infeasibility.
    required_memory_bytes
        Memory each block needs, shape (N,); used only to explain infeasibility.
    device_names
        Names of the K devices; used only to explain infeasibility.
    constant_s
        Time that every round takes whatever the allocation (downlink broadcast,
        server step), seconds; part of `Allocation.round_s` and `bound_s`.
    power_limited
        Full-band SNRs if the devices are power-limited; None for uniform power per
        sub-carrier.
    in_turn
        Whether devices upload one after the other, each over the whole band, when they
        have computed and the band is free (TDMA), in place of sharing it.
    energy
        What devices' parts take of their batteries; None where nothing is known of it.
    mode
        Which blocks are trained and who takes part.

    Raises
    ------
    UserError
        Shapes that do not fit together, a NaN or a negative number; the message names
        the field, the index and the value.
    """

    compute_s: Float64Array
    full_band_upload_s: Float64Array
    feasible: BoolArray = field(default_factory=lambda: np.ones((), dtype=np.bool_))
    memory_bytes: Float64Array | None = field(default=None, kw_only=True)
    required_memory_bytes: Float64Array | None = field(default=None, kw_only=True)
    device_names: Sequence[str] | None = field(default=None, kw_only=True)
    constant_s: float = field(default=0.0, kw_only=True)
    power_limited: PowerLimitedUplink | None = field(default=None, kw_only=True)
    in_turn: bool = field(default=False, kw_only=True)
    energy: EnergyCosts | None = field(default=None, kw_only=True)
    mode: RoundMode = field(default=RoundMode(), kw_only=True)

    def __post_init__(self) -> None:
        """Check every field and store a read-only copy of the arrays."""
        compute_s = _frozen_times("compute_s", self.compute_s)
        if compute_s.ndim != 2 or 0 in compute_s.shape:
            raise UserError(
                "Shape mismatch: compute_s must be (K devices, N blocks) with at least "
                f"one of each, but is {compute_s.shape}."
            )
        num_devices, num_blocks = shape = compute_s.shape
        upload = _frozen_times("full_band_upload_s", self.full_band_upload_s)
        _require_shape("full_band_upload_s", upload, shape)
        feasible = np.asarray(self.feasible)
        if feasible.dtype != np.bool_:
            raise UserError(f"feasible must be boolean, but is {feasible.dtype}.")
        if feasible.ndim:
            _require_shape("feasible", feasible, shape)
        feasible = (compute_s < IMPOSSIBLE_S) & feasible
        feasible &= upload < IMPOSSIBLE_S
        if self.power_limited is not None:
            if self.in_turn:
                raise UserError(
                    "in_turn=True gives each device the whole band, and power_limited "
                    "says what parts of it carry; drop one of the two."
                )
            snr = self.power_limited.snr
            _require_shape("power_limited.snr", snr, (num_devices,))
            feasible &= (snr > 0.0)[:, np.newaxis]  # [K, 1] against [K, N]
        feasible.setflags(write=False)
        if self.energy is not None:
            _require_shape("energy.compute_j", self.energy.compute_j, shape)
            _require_shape("energy.transmit_w", self.energy.transmit_w, shape[:1])
        for name, length in (
            ("memory_bytes", num_devices),
            ("required_memory_bytes", num_blocks),
        ):
            given = getattr(self, name)
            if given is not None:
                array = _frozen_times(name, given)
                _require_shape(name, array, (length,))
                object.__setattr__(self, name, array)
        if self.device_names is not None and len(self.device_names) != num_devices:
            raise UserError(
                f"Shape mismatch: {len(self.device_names)} device_names for "
                f"{num_devices} devices."
            )
        if not 0.0 <= self.constant_s < IMPOSSIBLE_S:
            raise UserError(
                "constant_s must be finite and not negative, but is "
                f"{self.constant_s} s."
            )
        object.__setattr__(self, "compute_s", compute_s)
        object.__setattr__(self, "full_band_upload_s", upload)
        object.__setattr__(self, "feasible", feasible)
        self.mode.check(self.num_blocks)

    @property
    def num_devices(self) -> int:
        """K, the number of devices."""
        return int(self.compute_s.shape[0])

    @property
    def num_blocks(self) -> int:
        """N, the number of blocks."""
        return int(self.compute_s.shape[1])

    @property
    def demand(self) -> IntArray:
        """Devices each block needs this round, shape (N,); 0 for a block left out."""
        return self.mode.demand(self.num_blocks)

    @property
    def all_devices(self) -> bool:
        """Whether every device has to take part."""
        return self.mode.participation == "all"

    @property
    def num_active(self) -> int:
        """Devices that take part in the round, backups not counted."""
        return self.num_devices if self.all_devices else int(self.demand.sum())

    def name_of(self, device: int) -> str:
        """Name of a device for messages; its row number where it has no name."""
        return str(device) if self.device_names is None else self.device_names[device]

    def snr_of(self, devices: Any) -> Float64Array | None:
        """Full-band SNR of some devices if they are power-limited, else None."""
        return None if self.power_limited is None else self.power_limited.snr[devices]


def _frozen_times(name: str, values: Any) -> Float64Array:
    """Return a read-only float64 copy, free of NaN and of negative numbers."""
    array = np.asarray(values, dtype=np.float64)
    if array.flags.writeable or not array.flags.owndata:
        array = array.copy()
    # The minimum of an array that holds a NaN is NaN, so one pass finds both faults.
    if array.size and not array.min() >= 0.0:
        index = tuple(int(i) for i in np.argwhere(~(array >= 0.0))[0])
        raise UserError(
            f"{name} must not be negative or NaN: {name}{list(index)}={array[index]}."
        )
    array.setflags(write=False)
    return array


def _require_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise UserError(
            f"Shape mismatch: {name} is {array.shape} but must be {shape} to go with "
            "compute_s, whose axes are (K devices, N blocks)."
        )
