"""What both strategies do in a round, whatever carries their messages."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any, TypeVar

import numpy.typing as npt
from flwr.common.logger import log

from lola_flwr.errors import UserError
from lola_flwr.heap import give_back_freed_memory
from lola_flwr.run.records import RoundRecord
from lola_flwr.server.absences import Absences
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.strategies.deadline import RoundDeadline
from lola_flwr.strategies.presence import AskProfiles, meet, wait_for_devices
from lola_flwr.wire.packing import VALUES, pack

Encoded = TypeVar("Encoded")

# An evaluation's largest weight, in median ones.
_LARGEST_WEIGHT = 10


class Rounds:
    """Carries the coordinator's rounds out, from waiting for devices to the record.

    Parameters
    ----------
    coordinator
        Plans and completes the rounds.
    min_available
        Devices that must be connected before the first round is planned (default: as
        many as the model has blocks). Later rounds go on with those that are there.
    wait_s
        How long to wait for them; in later rounds, for any device at all.
    on_round
        Called with each round's record, after its evaluation.
    deadline_factor, deadline_floor_s
        How long to wait for a round's replies: the factor times what the round should
        take by the clock, and the floor. A factor of 0: as long as Flower waits.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        min_available: int | None,
        wait_s: float,
        on_round: Callable[[RoundRecord], None] | None,
        deadline_factor: float,
        deadline_floor_s: float,
    ) -> None:
        self.min_available = (
            coordinator.partition.num_blocks if min_available is None else min_available
        )
        self.on_round = on_round
        # Flower counts each start's rounds from 1; a resumed run has done some before.
        self.rounds_before = coordinator.server_round
        self._coordinator = coordinator
        self._wait_s = wait_s
        self._plan: RoundPlan | None = None
        self._record: RoundRecord | None = None
        self._silent = Absences()
        self._plan_s = 0.0
        self._deadline = (
            RoundDeadline(deadline_factor, deadline_floor_s)
            if deadline_factor
            else None
        )
        self._sent_at = 0.0

    def restart(self) -> None:
        """Begin a run: its first round has to succeed, whatever went before."""
        if self._record is not None:
            self.rounds_before = 0
        self._plan = self._record = None

    def plan(
        self,
        server_round: int,
        *,
        connected: Callable[[], Collection[str]],
        ask_profiles: AskProfiles,
    ) -> RoundPlan | None:
        """Wait for devices, ask new ones for their profiles, and plan the round.

        Rounds are the run's here, not those of Flower's loop: ``rounds_before`` more.

        Parameters
        ----------
        server_round
            Round, from 1.
        connected
            Gives the ids of the devices that are there now.
        ask_profiles
            Asks unknown devices, all at once.

        Returns
        -------
        The plan, or None: the round is skipped, which is on record.

        Raises
        ------
        UserError
            In the run's first round: too few devices connected, or the devices cannot
            compute all blocks.
        """
        self._plan = None
        try:
            blocks = self._coordinator.partition.num_blocks
            devices = wait_for_devices(
                connected,
                needed=self.min_available if self._record is None else 1,
                wait_s=self._wait_s,
                why=f" (the model has {blocks} blocks)",
            )
            self._silent = meet(
                self._coordinator,
                devices,
                ask_profiles,
                server_round=server_round,
                silent=self._silent,
            )
            start = time.perf_counter()
            self._plan = self._coordinator.plan_round(server_round, devices)
        except UserError as error:
            if self._record is None and not self.rounds_before:
                raise
            self._record = self._coordinator.skip_round(server_round, str(error))
            log(WARNING, "%s", self._record.lines()[0])
        else:
            self._plan_s = time.perf_counter() - start
            # What the last round's replies took would otherwise stay the process's.
            give_back_freed_memory()
            self._sent_at = time.monotonic()
        return self._plan

    def contents(
        self,
        plan: RoundPlan,
        encoded: Mapping[str, Encoded],
        encode: Callable[[npt.NDArray[Any]], Encoded],
    ) -> Iterator[tuple[str, dict[str, Encoded]]]:
        """Give each device of a plan, and the arrays that it is sent, by name.

        Parameters
        ----------
        plan
            The round's plan.
        encoded
            All arrays of the coordinator, encoded for the wire. Devices that return
            weights are sent these, all others values in one array: of what their
            manifest says, or all trainable ones.
        encode
            Encodes an array. Devices that are sent the same share what it returns.
        """
        packed: dict[tuple[str, ...], Encoded] = {}
        for device in plan.assignments:
            names = plan.sent_names(device, [*encoded])
            if self._coordinator.sends_by_name or not names:
                yield device, {name: encoded[name] for name in names}
                continue
            if names not in packed:
                values = self._coordinator.state()
                packed[names] = encode(pack({name: values[name] for name in names}))
            yield device, {VALUES: packed[names]}

    def wait_s(self) -> float:
        """Return how long the replies to the present round may take; else infinity."""
        if self._plan is None or self._deadline is None:
            return math.inf
        seconds: float = self._deadline.wait_s(self._plan.allocation.round_s)
        return seconds

    def complete(self, replies: Iterable[DeviceReply]) -> dict[str, int | float] | None:
        """Take the round's replies in; return its metrics, or None if skipped."""
        plan, self._plan = self._plan, None
        if plan is None:
            return None
        replies = list(replies)
        if self._deadline is not None:
            self._deadline.learn(
                plan.allocation.round_s,
                time.monotonic() - self._sent_at,
                asked=len(plan.assignments),
                answered=len({reply.device_id for reply in replies}),
            )
        start = time.perf_counter()
        record = self._coordinator.complete_round(plan, replies)
        self._record = replace(
            record, measured_strategy_s=self._plan_s + time.perf_counter() - start
        )
        for line in record.lines():
            log(INFO, "%s", line)
        if all(block.status != "accepted" for block in record.blocks):
            first = record.blocks[0]
            log(WARNING, "no update could be used; %s: %s", first.device, first.status)
        metrics: dict[str, int | float] = {
            "round_s": record.round_s,
            "wireless_s": record.wireless_s,
            "refused": sum(record.refused.values()),
        }
        if record.train_loss is not None:
            metrics["train_loss"] = record.train_loss
        return metrics

    def report(self, server_round: int, metrics: Mapping[str, object]) -> None:
        """Hand on the round's record, with those of its metrics that are numbers."""
        record = self._record
        if record is None or record.server_round != server_round:
            return
        if self.on_round is not None:
            self.on_round(with_metrics(record, metrics))


def evaluation_weights(claims: Sequence[float]) -> list[float]:
    """Return what evaluations may weigh, which claim to be over so many examples.

    None weighs more than ten times the (lower) median, so that no claim decides alone.
    """
    limit = _LARGEST_WEIGHT * statistics.median_low(claims) if claims else 0
    return [min(claim, limit) for claim in claims]


def with_metrics(record: RoundRecord, metrics: Mapping[str, object]) -> RoundRecord:
    """Return a record with those metrics of an evaluation that are numbers."""
    numbers = {name: float(v) for name, v in metrics.items() if _is_number(v)}  # type: ignore[arg-type]
    return replace(record, metrics=numbers)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
