"""Let devices that cannot back-propagate take part beside those that can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from lola_flwr.allocation import AllocationProblem
from lola_flwr.allocation.infeasible import is_feasible
from lola_flwr.arrays import BoolArray, Float64Array
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.errors import UserError
from lola_flwr.randomness import rng_for
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.estimation import ComputeEstimate
from lola_flwr.zeroth_order.directions import MAX_DIRECTIONS

Use = Literal["fallback", "always"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ZerothOrder:
    """How the server uses devices that train without back-propagation.

    Parameters
    ----------
    costs
        What a block costs such a device.
    use
        "fallback": where the devices that can back-propagate do not suffice for the
        round's blocks, those that can hold the back-propagation of none of them train
        without it; "always": all devices do. But for those that can train by
        back-propagation alone.
    lr
        Learning rate of these updates, a plain step of gradient descent: an optimizer
        that normalises its steps would turn their noise into full steps.
    num_directions
        Directions of one device in one round; where weights are moved, two forward
        passes each.
    perturbation
        How far weights are moved along a direction (MeZO's epsilon); 0: not at all,
        the derivative along it is computed (Spry's forward-mode differentiation).
    smallest_share
        As in `Directions`.

    Raises
    ------
    UserError
        A field is out of range.
    """

    costs: BlockCosts = field(repr=False)
    use: Use = "fallback"
    lr: float = 1e-5
    num_directions: int = 16
    perturbation: float = 1e-3
    smallest_share: float = 1.0

    def __post_init__(self) -> None:
        if self.use not in get_args(Use):
            raise UserError(
                f"zeroth-order use={self.use!r} is unknown; choose from "
                f"{', '.join(get_args(Use))}."
            )
        if not 1 <= self.num_directions <= MAX_DIRECTIONS:
            raise UserError(
                f"num_directions={self.num_directions} must be from 1 to "
                f"{MAX_DIRECTIONS}."
            )
        if self.lr <= 0 or self.perturbation < 0 or not 0 < self.smallest_share <= 1:
            raise UserError(
                f"lr={self.lr} must be positive, perturbation={self.perturbation} not "
                f"negative, smallest_share={self.smallest_share} in (0, 1]."
            )

    def directions_for(
        self, seed: int, server_round: int, device_name: str
    ) -> dict[str, Any]:
        """Return the fields of an assignment that ask for directions."""
        rng = rng_for(seed, "directions", server_round, device_name)
        return {
            "direction_seed": int(rng.integers(2**62)),
            "num_directions": self.num_directions,
            "perturbation": self.perturbation,
            "smallest_share": self.smallest_share,
        }


def mix(
    problem: AllocationProblem,
    settings: ZerothOrder | None,
    profiles: Sequence[DeviceProfile],
    *,
    rate_bps: Float64Array,
    estimate: ComputeEstimate,
    unasked: BoolArray,
) -> tuple[AllocationProblem, BoolArray]:
    """Add the devices that are to train by forward passes alone to a round's problem.

    Parameters
    ----------
    problem
        The round's problem with back-propagation on every device.
    settings
        How such devices are used; None: not at all.
    profiles
        The K devices, in the order of its rows.
    rate_bps
        Their full-band rates, shape [K].
    estimate
        Corrects the compute times that follow from the profiles.
    unasked
        Pairs of device and block that had better not be asked to back-propagate, shape
        [K, N]: whether the others suffice decides about "fallback".

    Returns
    -------
    The problem in which these devices have the costs of forward passes, and which ones
    they are, shape [K]. The allocator weighs them against the others by cost.
    """
    chosen: BoolArray = np.zeros(problem.num_devices, np.bool_)
    if settings is None:
        return problem, chosen
    asked = replace(problem, feasible=problem.feasible & ~unasked)
    if settings.use == "fallback" and is_feasible(asked):
        return problem, chosen
    if settings.use == "fallback":
        chosen = np.asarray(~problem.feasible[:, problem.demand > 0].any(axis=1))
    else:
        chosen[:] = True
    chosen &= ~np.array([profile.trains_one_block for profile in profiles], bool)
    costs = settings.costs
    speed = np.array([profile.flops_per_s for profile in profiles])
    memory_bytes = np.array([profile.memory_bytes for profile in profiles])
    claimed_s = costs.flops[None, :] / speed[:, None]  # [K, N]
    rows = chosen[:, None]
    mixed = replace(
        problem,
        compute_s=np.where(
            rows,
            estimate.correct(claimed_s, [p.name for p in profiles]),
            problem.compute_s,
        ),
        full_band_upload_s=np.where(
            rows, costs.payload_bits / rate_bps[:, None], problem.full_band_upload_s
        ),
        feasible=np.where(
            rows, costs.memory_bytes <= memory_bytes[:, None], problem.feasible
        ),
    )
    return mixed, chosen
