"""What a device's part of a round takes of its battery.

A device draws one power while it computes and another while it sends. The second is
what the whole device draws then, circuits included, and is taken not to depend on its
share of the band. (What a radio radiates does, with uniform power per sub-carrier, but
is mostly a small part of that.) While a device waits, nothing is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lola_flwr.arrays import BoolArray, Float64Array, IntArray
from lola_flwr.errors import UserError


@dataclass(frozen=True, eq=False)
class EnergyCosts:
    """Energy of each (device, block) pair, but for what depends on the share.

    Parameters
    ----------
    compute_j
        Energy of the computation, joules, shape (K, N); NaN where it is not known.
    transmit_w
        What each device draws while it sends, watts, shape (K,); NaN where it is not
        known.

    Raises
    ------
    UserError
        A value is negative or infinite; the message names it.
    """

    compute_j: Float64Array
    transmit_w: Float64Array

    def __post_init__(self) -> None:
        """Check and freeze the arrays."""
        for name, axes in (("compute_j", 2), ("transmit_w", 1)):
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.ndim != axes:
                raise UserError(f"{name} must have {axes} axes, but is {array.shape}.")
            bad = np.argwhere(~(np.isnan(array) | (np.isfinite(array) & (array >= 0))))
            if bad.size:
                index = tuple(int(i) for i in bad[0])
                raise UserError(
                    f"{name} must be finite and not negative: "
                    f"{name}{list(index)}={array[index]}."
                )
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @classmethod
    def of_powers(
        cls, compute_s: ArrayLike, compute_w: ArrayLike, transmit_w: ArrayLike
    ) -> EnergyCosts:
        """Return the costs of devices that draw constant powers.

        Parameters
        ----------
        compute_s
            Computation latency of each pair, seconds, shape (K, N).
        compute_w, transmit_w
            What each device draws while it computes and while it sends, watts, shape
            (K,); NaN where that is not known.
        """
        seconds = np.asarray(compute_s, dtype=np.float64)
        # Pairs that are impossible take forever.
        seconds = np.where(np.isfinite(seconds), seconds, 0.0)
        watts = np.asarray(compute_w, dtype=np.float64)[:, np.newaxis]  # [K, 1]
        return cls(seconds * watts, np.asarray(transmit_w, dtype=np.float64))

    @property
    def unknown(self) -> BoolArray:
        """Tell of which devices something is not known, shape (K,)."""
        return np.asarray(np.isnan(self.compute_j).any(axis=1)) | np.isnan(
            self.transmit_w
        )

    def of_rows(self, rows: IntArray) -> EnergyCosts:
        """Return the same for some of the devices."""
        return EnergyCosts(self.compute_j[rows], self.transmit_w[rows])
