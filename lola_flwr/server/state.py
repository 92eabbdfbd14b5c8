"""What the coordinator has learned in a run, beside the model, as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lola_flwr.server.absences import Absences
from lola_flwr.server.norm_limits import NormHistory
from lola_flwr.server.selection.history import BlockHistory
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.estimation import ComputeEstimate, RateEstimate

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Everything that later rounds depend on, but for the model and its optimizer.

    Random numbers are no part of it: they follow from the seed, the round and the
    devices' names (``lola_flwr.randomness``).

    Parameters
    ----------
    server_round
        Last complete round; 0 before the first.
    wireless_s
        Sum of the rounds' observed latencies so far.
    profiles
        Profiles of the devices that are there, by device id.
    estimate
        Correction of the compute times that they claim by what was observed.
    rates
        The same for the rates of their uplinks.
    meetings
        How often a device's update of a block was accepted, by name and block.
    history
        What became of each block.
    absences
        Who failed lately.
    norms
        Norms of the updates received lately.
    """

    server_round: int
    wireless_s: float
    profiles: Mapping[str, DeviceProfile]
    estimate: ComputeEstimate
    rates: RateEstimate
    meetings: Counter[tuple[str, int]]
    history: BlockHistory
    absences: Absences
    norms: NormHistory

    def to_values(self) -> dict[str, Any]:
        """Return the state as JSON knows it: keys that are no strings become lists."""
        return {
            "server_round": self.server_round,
            "wireless_s": self.wireless_s,
            "profiles": {d: asdict(profile) for d, profile in self.profiles.items()},
            "device_log_factor": dict(self.estimate.device_log_factor),
            "block_log_factor": [*self.estimate.block_log_factor.items()],
            "rate_log_factor": dict(self.rates.device_log_factor),
            "last_round": self.history.last_round.tolist(),
            "relative_move": self.history.relative_move.tolist(),
            "importance": self.history.importance.tolist(),
            "meetings": [[*pair, count] for pair, count in self.meetings.items()],
            "absences": self.absences.to_values(),
            "norms": [*self.norms.of_block.items()],
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_values`` returned, after a way through JSON."""
        return cls(
            server_round=values["server_round"],
            wireless_s=values["wireless_s"],
            profiles={d: DeviceProfile(**p) for d, p in values["profiles"].items()},
            estimate=ComputeEstimate(
                values["device_log_factor"], dict(values["block_log_factor"])
            ),
            rates=RateEstimate(values["rate_log_factor"]),
            history=BlockHistory(
                last_round=np.array(values["last_round"], np.int64),
                relative_move=np.array(values["relative_move"], np.float64),
                importance=np.array(values["importance"], np.float64),
            ),
            meetings=Counter({(d, n): count for d, n, count in values["meetings"]}),
            absences=Absences.from_values(values["absences"]),
            norms=NormHistory({n: tuple(norms) for n, norms in values["norms"]}),
        )
