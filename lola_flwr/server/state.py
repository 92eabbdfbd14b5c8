"""What a run's rounds to come depend on, beside the model, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from lola_flwr.errors import UserError
from lola_flwr.planning.pace import Pace
from lola_flwr.run.values import from_values, to_values
from lola_flwr.server.fleet import Fleet
from lola_flwr.server.influence import Influence
from lola_flwr.server.norm_limits import NormHistory
from lola_flwr.server.reputation import Reputation
from lola_flwr.server.selection.history import BlockHistory
from lola_flwr.system.component_importance import ComponentImportance
from lola_flwr.system.estimation import (
    ComputeEstimate,
    DownlinkEstimate,
    RateEstimate,
)
from lola_flwr.system.gradient_noise import GradientNoise
from lola_flwr.wire.held_versions import HeldVersions

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self

_State = TypeVar("_State")


@dataclass(frozen=True, kw_only=True, eq=False)
class RunState:
    """Everything that later rounds depend on, but for the model and its optimizer.

    Random numbers are no part of it: they follow from the seed, the round and the
    devices' names (``lola_flwr.randomness``). Nor is what a strategy learns of the wall
    clock, which another process on another machine has to learn anew.

    Parameters
    ----------
    server_round
        Last complete round; 0 before the first.
    wireless_s
        Sum of the rounds' observed latencies so far.
    joules
        Sum of their devices' energy; None where that of any is not known.
    fleet
        The devices that are there, and who failed lately.
    estimate
        Correction of the compute times that devices claim by what was observed.
    rates
        The same for the rates of their uplinks.
    downlinks
        How long the devices took to have their messages.
    meetings
        How often a device's update of each of the N blocks was accepted, [N] by the
        device's name.
    influence
        Who gave the latest updates of each block.
    history
        What became of each block.
    norms
        Norms of the updates received lately.
    reputation
        How far devices are trusted, by what they sent.
    held
        Which pieces of the model devices hold.
    noise
        How noisy the blocks' gradients are, where batches follow from it.
    pace
        How fast the run comes on, likewise.
    components
        How large the gradients of adapters' components are, where devices send some.
    """

    server_round: int = 0
    wireless_s: float = 0.0
    joules: float | None = 0.0
    fleet: Fleet = field(default_factory=Fleet)
    estimate: ComputeEstimate = field(default_factory=ComputeEstimate)
    rates: RateEstimate = field(default_factory=RateEstimate)
    downlinks: DownlinkEstimate = field(default_factory=DownlinkEstimate)
    meetings: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    influence: Influence = field(default_factory=Influence)
    history: BlockHistory
    norms: NormHistory = field(default_factory=NormHistory)
    reputation: Reputation = field(default_factory=Reputation)
    held: HeldVersions = field(default_factory=HeldVersions)
    noise: GradientNoise = field(default_factory=GradientNoise)
    pace: Pace = field(default_factory=Pace)
    components: ComponentImportance = field(default_factory=ComponentImportance)

    def meetings_of(self, device_name: str) -> tuple[int, ...]:
        """Return how often each block met a device's data, [N]."""
        return self.meetings.get(device_name, (0,) * self.history.num_blocks)

    def counted_on(self, server_round: int, device_ids: Sequence[str]) -> list[str]:
        """Return the devices but for those that rest since they are not trusted.

        A block that one of these has is trained by nobody in that round, so others
        rather train several. If all do, they are all returned.
        """
        absences, reputation = self.fleet.absences, self.reputation
        names = {device: self.fleet.profiles[device].name for device in device_ids}
        counted_on = [
            device
            for device, name in names.items()
            if absences.memory_limit(server_round, name) or reputation.weight(name)
        ]
        return counted_on or list(device_ids)

    def block_updates(self) -> npt.NDArray[np.int64]:
        """Return how many updates of each block have been accepted, [N]."""
        none = np.zeros(self.history.num_blocks, np.int64)
        return sum((np.array(counts) for counts in self.meetings.values()), none)

    def to_values(self) -> dict[str, Any]:
        """Return the state as JSON knows it."""
        values: dict[str, Any] = to_values(self)
        return values

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``to_values`` returned, after a way through JSON.

        Raises
        ------
        UserError
            The values are not those of this version's state.
        """
        if "last_round" in values:
            values = _of_first_layout(values)
        # Earlier versions did not know it.
        missing = {
            "joules": None,
            "downlinks": to_values(DownlinkEstimate()),
            "reputation": to_values(Reputation()),
            "noise": to_values(GradientNoise()),
            "influence": to_values(Influence()),
            "pace": to_values(Pace()),
            "components": to_values(ComponentImportance()),
        }
        values = {**missing, **values}
        values["reputation"] = {**missing["reputation"], **values["reputation"]}
        if "norms" in values:
            values["norms"] = {"devices": {}, **values["norms"]}
        state = restored(cls, values)
        # A run that goes on has another id, and devices keep their copies by run.
        return replace(state, held=HeldVersions())


def restored(kind: type[_State], values: Mapping[str, Any]) -> _State:
    """Read a state of a kind from what a checkpoint holds.

    Raises
    ------
    UserError
        The values are not those of this version's state.
    """
    try:
        return from_values(kind, values)
    except ValueError as error:
        raise UserError(
            f"The checkpoint is of another version of lola-flwr ({error}); go on with "
            "that version, or give this run another output directory."
        ) from None


def _of_first_layout(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a state that was written when its parts lay side by side."""
    num_blocks = len(values["last_round"])
    meetings: dict[str, list[int]] = {}
    for device, block, count in values["meetings"]:
        meetings.setdefault(device, [0] * num_blocks)[block] = count
    fleet = Fleet()
    return {
        "server_round": values["server_round"],
        "wireless_s": values["wireless_s"],
        "fleet": {
            **to_values(fleet),
            "profiles": values["profiles"],
            "absences": {"of_device": values["absences"]},
        },
        "estimate": {
            "device_log_factor": values["device_log_factor"],
            "block_log_factor": dict(values["block_log_factor"]),
        },
        "rates": {"device_log_factor": values["rate_log_factor"]},
        "meetings": meetings,
        "history": {
            **{n: values[n] for n in ("last_round", "relative_move", "importance")},
            "blocks": None,
        },
        "norms": {"of_block": dict(values["norms"])},
        "held": to_values(HeldVersions()),
    }
