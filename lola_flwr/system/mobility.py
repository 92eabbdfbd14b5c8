"""Devices that move, and what that does to their mean SNR."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lola_flwr.arrays import Float64Array
from lola_flwr.errors import UserError, nearest
from lola_flwr.randomness import rng_for
from lola_flwr.system.own_channel import Moment

# No device comes closer to the base station's mast (3GPP TR 38.901, UMi: 10 m).
_LEAST_M = 10.0
# Geometric mean of the distance from the centre of a square of side 2.
_MEAN_DISTANCE = math.exp((math.log(2) - 3 + math.pi / 2) / 2)


@dataclass(frozen=True, kw_only=True)
class Mobility:
    """Devices move straight on through a square cell and are reflected at its border.

    Where one starts, and in which direction, is drawn; with reflection it is anywhere
    in the cell with equal chance at any time (Nain et al., "Properties of random
    direction models", IEEE INFOCOM 2005). The base station is at the centre, and the
    mean SNR falls with the distance to the power of an exponent. A profile's SNR is the
    mean, in dB, over the cell.

    Parameters
    ----------
    speed_m_s
        Speed of every device, metres a second; 1.4 is a walk.
    cell_m
        Side of the cell, metres.
    exponent
        Path-loss exponent: 2 in free space, 2.7 to 3.5 in cities (Rappaport, "Wireless
        Communications", 2nd ed., table 4.2).

    Raises
    ------
    UserError
        A value is out of range.
    """

    speed_m_s: float = 1.4
    cell_m: float = 500.0
    exponent: float = 3.5

    def __post_init__(self) -> None:
        """Check the ranges; NaN is within none."""
        for name, low, high in (
            ("speed_m_s", 0.0, 1e3),
            ("cell_m", 4 * _LEAST_M, 1e5),
            ("exponent", 0.0, 10.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool | str) or not low <= value <= high:
                raise UserError(
                    f"{name}={value!r} of the mobility must be a number from {low:g} "
                    f"to {high:g}."
                )

    def distance_m(self, names: Sequence[str], moment: Moment) -> Float64Array:
        """Return each device's distance from the base station, metres, shape [K].

        It depends on the device's name, the time and the seed alone.
        """
        half_m = self.cell_m / 2
        positions = []
        for name in names:
            rng = rng_for(moment.seed, "mobility", name)
            start_m, heading = rng.uniform(-half_m, half_m, 2), math.tau * rng.random()
            way_m = self.speed_m_s * moment.time_s
            positions.append(
                start_m + way_m * np.array([math.cos(heading), math.sin(heading)])
            )
        # To and fro between the borders: a triangle wave in either direction.
        unfolded_m = np.array(positions).reshape(-1, 2) + half_m
        inside_m = half_m - np.abs(unfolded_m % (2 * self.cell_m) - self.cell_m)
        distance_m = np.hypot(inside_m[:, 0], inside_m[:, 1])
        return np.asarray(np.maximum(distance_m, _LEAST_M))

    def gain_db(self, names: Sequence[str], moment: Moment) -> Float64Array:
        """Return by how much each device's SNR is above its mean, dB, shape [K]."""
        mean_m = _MEAN_DISTANCE * self.cell_m / 2
        nearer = mean_m / self.distance_m(names, moment)
        return np.asarray(10.0 * self.exponent * np.log10(nearer))


def mobility_of(options: Mapping[str, Any]) -> Mobility | None:
    """Return how devices move by some of its fields; None without any.

    Raises
    ------
    UserError
        There is no such field, or a value is out of range.
    """
    known = [field.name for field in fields(Mobility)]
    for name in options:
        if name not in known:
            raise UserError(
                f"mobility has no {name!r}; it has {', '.join(known)}."
                f"{nearest(name, known)}"
            )
    return Mobility(**options) if options else None
