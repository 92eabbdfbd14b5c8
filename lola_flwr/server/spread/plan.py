"""What is known before a step of D2FT, and what is decided about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lola_flwr.arrays import IntArray
from lola_flwr.d2ft.schedule import Scores
from lola_flwr.errors import UserError
from lola_flwr.run.records import StepRecord
from lola_flwr.server.fleet import Fleet
from lola_flwr.server.norm_limits import NormHistory, NormLimits
from lola_flwr.server.spread.losses import LossLimits
from lola_flwr.system.devices import DeviceProfile

# Gradients of losses are more alike than updates of blocks, so what is too long begins
# at twice the usual length instead of three times. (Turned round by two owners of
# twelve, 2.9 times as long ruins a model, and 1.9 times does not: docs/security.md.)
_OF_LOSSES = 2 / 3


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """How large the micro-batches of a step are.

    Parameters
    ----------
    micro_batch_size
        Examples of a micro-batch, at most.
    max_tokens
        Tokens of an example, at most.
    example_weight
        What an example weighs at most: its tokens where losses are means over tokens.
    """

    micro_batch_size: int = 8
    max_tokens: int = 512
    example_weight: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class SpreadState:
    """Everything that later steps depend on, but for the model and its optimizer.

    Parameters
    ----------
    server_round
        Last complete step; 0 before the first.
    wireless_s
        Sum of the steps' latencies so far.
    fleet
        The devices that are there, and who failed lately.
    scores
        What the sub-networks' passes are worth, as far as it is known.
    excluded
        Names of the devices that were found to lie: they take part no more.
    norms, shown
        How long gradients of losses were lately, and whose losses are cross-entropy, as
        in `LossLimits`; None before the first.
    """

    server_round: int = 0
    wireless_s: float = 0.0
    fleet: Fleet = field(default_factory=Fleet)
    scores: Scores | None = None
    # None, not empty: the states of earlier versions have no such fields.
    excluded: tuple[str, ...] | None = None
    norms: NormHistory | None = None
    shown: Mapping[str, bool] | None = None

    def usable(self, server_round: int, device_ids: Iterable[str]) -> list[str]:
        """Return the devices that a step can do with.

        Raises
        ------
        UserError
            There is none.
        """
        names = {d: profile.name for d, profile in self.fleet.profiles.items()}
        honest = [d for d in device_ids if names.get(d) not in (self.excluded or ())]
        devices = self.fleet.rested(server_round, honest)
        if not devices:
            lied = (
                f" Found to lie: {', '.join(self.excluded)}." if self.excluded else ""
            )
            raise UserError(f"No device has a usable profile.{lied}")
        return devices

    def loss_limits(self, factor: float) -> LossLimits:
        """Return how long gradients of losses may be, where updates have a factor."""
        names = {d: profile.name for d, profile in self.fleet.profiles.items()}
        limits = NormLimits(math.inf, _OF_LOSSES * factor)
        return LossLimits(limits, self.norms or NormHistory(), names, self.shown or {})

    def with_losses(self, limits: LossLimits) -> SpreadState:
        """Take note of what a step's losses have shown."""
        return replace(self, norms=limits.norms, shown=limits.shown or None)

    def after(
        self,
        record: StepRecord,
        outcomes: Mapping[str, float | None],
        scores: Scores | None,
    ) -> SpreadState:
        """Return the state after a step; ``outcomes`` are as for `Fleet.after`."""
        return replace(
            self,
            server_round=record.server_round,
            wireless_s=record.wireless_s,
            fleet=self.fleet.after(record.server_round, outcomes),
            scores=scores,
        )

    def excluding(self, device_ids: Iterable[str]) -> SpreadState:
        """Take note of who was found to lie."""
        names = [self.fleet.profiles[d].name for d in device_ids]
        return replace(self, excluded=(*(self.excluded or ()), *names) or None)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepPlan:
    """Who computes what in one step.

    Parameters
    ----------
    step
        Step, from 1.
    device_ids
        The K devices that take part.
    profiles
        Their profiles.
    device_of
        Device of each sub-network, shape [S].
    operations
        What each sub-network does in each micro-batch, shape [S, M].
    present
        The ids of all devices that are there, whether they take part or not.
    """

    step: int
    device_ids: tuple[str, ...]
    profiles: tuple[DeviceProfile, ...]
    device_of: IntArray
    operations: IntArray
    present: frozenset[str]

    def owners(self, order: IntArray, first: int) -> dict[str, list[int]]:
        """Return the numbers of the micro-batches that each device is to draw.

        Each is from the data of another device in turn.

        Parameters
        ----------
        order
            The devices in turn, shape [K].
        first
            Number of the first micro-batch.
        """
        numbers: dict[str, list[int]] = {}
        for m in range(self.operations.shape[1]):
            owner = self.device_ids[order[m % len(order)]]
            numbers.setdefault(owner, []).append(first + m)
        return numbers
