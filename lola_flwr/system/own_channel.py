"""Channels of one's own: a function says what links carry, or a recorded trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lola_flwr.arrays import Float64Array
from lola_flwr.errors import UserError, brief
from lola_flwr.machine.files import local_path
from lola_flwr.machine.imported import imported
from lola_flwr.system.traces import Traces

if TYPE_CHECKING:
    from lola_flwr.system.devices import DeviceProfile

# Those of the rates that profiles may state.
_LEAST_BPS, _LARGEST_BPS = 1e3, 1e12


@dataclass(frozen=True)
class Moment:
    """When a round begins.

    Parameters
    ----------
    server_round
        Round, from 1.
    time_s
        Wireless time of the rounds before, seconds.
    seed
        Seed of the run.
    """

    server_round: int
    time_s: float
    seed: int


class RateFunction(Protocol):
    """A function that says what devices' uplinks carry during a round.

    It should be one of its arguments alone: a run that goes on asks it again.
    """

    def __call__(self, profiles: Sequence[DeviceProfile], moment: Moment, /) -> Any:
        """Return each device's rate when it has the whole uplink, bit/s, shape [K]."""


def find_channel(name: str) -> RateFunction | None:
    """Return the channel of a name.

    Parameters
    ----------
    name
        ``"package.module:function"``, or a file of traces, ``"*.csv"``; "" for that of
        the devices' SNR.

    Raises
    ------
    UserError
        There is no such function, or the file cannot be read.
    """
    if not name:
        return None
    if name.endswith(".csv"):
        return _Replay(name, Traces.read(local_path(name)))
    if ":" in name:
        return imported("channel", name)
    raise UserError(
        f"channel={brief(name)} must be 'package.module:function' or a file of traces "
        "'*.csv'."
    )


def own_rates_bps(
    rates: RateFunction, profiles: Sequence[DeviceProfile], moment: Moment
) -> Float64Array:
    """Return the rates that a channel of one's own has in a round, [K].

    Raises
    ------
    UserError
        It returns something else than a rate for each device.
    """
    found = rates(profiles, moment)
    try:
        rate_bps = np.asarray(found, np.float64)
    except (TypeError, ValueError):
        rate_bps = np.empty(())
    if rate_bps.shape != (len(profiles),):
        raise UserError(
            f"channel: the function returned {brief(found)} for {len(profiles)} "
            "devices; it must return one rate each, in bit/s."
        )
    # NaN is within no bounds.
    wrong = np.flatnonzero(~((rate_bps >= _LEAST_BPS) & (rate_bps <= _LARGEST_BPS)))
    if wrong.size:
        device = int(wrong[0])
        raise UserError(
            f"channel: {rate_bps[device]:g} bit/s for {profiles[device].name!r} in "
            f"round {moment.server_round}; a rate is from {_LEAST_BPS:g} to "
            f"{_LARGEST_BPS:g} bit/s."
        )
    return rate_bps


@dataclass(frozen=True)
class _Replay:
    """Recorded traces as a channel."""

    name: str
    traces: Traces

    def __call__(
        self, profiles: Sequence[DeviceProfile], moment: Moment, /
    ) -> Float64Array:
        try:
            return np.array(
                [
                    max(self.traces.rate_bps(p.name, moment.time_s), _LEAST_BPS)
                    for p in profiles
                ]
            )
        except KeyError as error:
            known = brief(", ".join(self.traces.devices))
            raise UserError(
                f"channel={Path(self.name).name!r} has no device {error.args[0]!r}; it "
                f"has {known}. Name devices as in the trace, by a fleet file."
            ) from None
