"""What every strategy does in a round, whatever its method and its messages."""

from __future__ import annotations

import time
from collections.abc import (
    Callable,
    Collection,
    Mapping,
)
from dataclasses import dataclass, replace
from logging import INFO, WARNING
from typing import Generic

from flwr.common.logger import log

from lola_flwr.errors import UserError
from lola_flwr.machine.heap import give_back_freed_memory
from lola_flwr.run.records import Record
from lola_flwr.server.method import Answers, Method, Plan
from lola_flwr.strategies.presence import AskProfiles, meet, wait_for_devices

OnRound = Callable[[Record], None]


@dataclass(frozen=True, kw_only=True)
class Waits:
    """How long devices are waited for.

    Parameters
    ----------
    devices_s
        For enough of them before the run ends with an error; in later rounds, for any.
    settle_s
        For another one, where there are fewer than the model has blocks and no number
        is asked for: then the run begins with those that are there.
    profiles_s
        For the profiles of new ones, whose first message starts their program.
    deadline_factor, deadline_floor_s
        For a round's replies: no longer than the factor times what most devices need,
        in rounds before and in this one, and the floor, of which a tenth is left after
        ten rounds. A factor of 0: as long as Flower waits.
    """

    devices_s: float = 60.0
    settle_s: float = 5.0
    profiles_s: float = 300.0
    deadline_factor: float = 4.0
    deadline_floor_s: float = 30.0


class Rounds(Generic[Plan, Answers]):
    """Carries a method's rounds out, from waiting for devices to the record.

    Parameters
    ----------
    method
        Plans and completes the rounds.
    min_available
        Devices that must be connected before the first round is planned. Later rounds
        go on with those that are there.
    enough
        How many will do if no more come (default: no fewer).
    waits
        How long to wait for them.
    on_round
        Called with each round's record, after its evaluation.
    why
        Why so many devices are needed, for the error.
    """

    def __init__(
        self,
        method: Method[Plan, Answers],
        *,
        min_available: int,
        enough: int | None = None,
        waits: Waits,
        on_round: OnRound | None,
        why: str = "",
    ) -> None:
        self.min_available = min_available
        self._enough = min_available if enough is None else enough
        self.on_round = on_round
        # Flower counts each start's rounds from 1; a resumed run has done some before.
        self.rounds_before = method.server_round
        self._method = method
        self._waits = waits
        self._why = why
        self._plan: Plan | None = None
        self._planned = 0
        self._record: Record | None = None
        self._plan_s = self._began = 0.0
        self._start_metrics: Mapping[str, float] = {}

    def restart(self) -> None:
        """Begin a run: its first round has to succeed, whatever went before."""
        # A strategy that has run before counts from its own round 1 again.
        self.rounds_before = (
            0 if self._record is not None else self._method.server_round
        )
        self._plan = self._record = None
        self._start_metrics = {}

    def plan(
        self,
        server_round: int,
        *,
        connected: Callable[[], Collection[str]],
        ask_profiles: AskProfiles,
        draw: Callable[[Collection[str]], Collection[str]] = lambda devices: devices,
    ) -> Plan | None:
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
        draw
            Chooses whom, of those that are there, the round may ask (default: all).

        Returns
        -------
        The plan, or None: the round is skipped, which is on record.

        Raises
        ------
        UserError
            In the run's first round: too few devices connected, or no plan for them.
        """
        self._plan, self._planned = None, server_round
        self._began = time.perf_counter()
        try:
            devices = self.wait_for_devices(connected)
            meet(self._method, devices, ask_profiles, server_round=server_round)
            start = time.perf_counter()
            self._plan = self._method.plan_round(server_round, draw(devices))
        except UserError as error:
            if self._record is None and not self.rounds_before:
                raise
            self._record = self._method.skip_round(server_round, str(error))
            _log(self._record)
        else:
            self._plan_s = time.perf_counter() - start
            # What the last round's replies took would otherwise stay the process's.
            give_back_freed_memory()
        return self._plan

    def wait_for_devices(
        self, connected: Callable[[], Collection[str]]
    ) -> Collection[str]:
        """Wait until enough devices are connected for the next round.

        Raises
        ------
        UserError
            There are fewer in the end.
        """
        is_first = self._record is None
        return wait_for_devices(
            connected,
            needed=self._enough if is_first else 1,
            wait_s=self._waits.devices_s,
            wanted=self.min_available if is_first else 1,
            settle_s=self._waits.settle_s,
            why=self._why,
        )

    def complete(self, answers: Answers) -> dict[str, float] | None:
        """Take the round's answers in; return its figures, or None if skipped."""
        plan, self._plan = self._plan, None
        if plan is None:
            return None
        start = time.perf_counter()
        record = self._method.complete_round(plan, answers)
        record = record.taken(self._plan_s + time.perf_counter() - start)
        self._record = record
        _log(record)
        return None if record.skipped else record.figures()

    def require_complete(self, strategy: object) -> None:
        """Make sure that the replies to the last plan have been taken in.

        Parameters
        ----------
        strategy
            Whose methods Flower calls.

        Raises
        ------
        UserError
            They have not: a subclass aggregates for itself, and would average blocks
            with other blocks.
        """
        if self._plan is not None:
            raise UserError(
                f"{type(strategy).__name__} aggregates without LoLaDeft, but each "
                "reply holds its device's blocks alone: let its aggregate_train, or "
                "aggregate_fit, call super()'s, and go on from what that returns."
            )

    def give_up(self, reason: str) -> None:
        """Leave the model as it is in the present round, whatever was answered."""
        plan, self._plan = self._plan, None
        if plan is not None:
            self._record = self._method.skip_round(self._planned, reason)
            _log(self._record)

    def report(self, server_round: int, metrics: Mapping[str, object]) -> None:
        """Hand on the round's record, with those of its metrics that are numbers.

        Those of round 0, the model that a run starts from, go with its first record.
        """
        numbers = {name: float(v) for name, v in metrics.items() if _is_number(v)}  # type: ignore[arg-type]
        if server_round == 0:
            self._start_metrics = numbers
        record = self._record
        if record is None or record.server_round != server_round:
            return
        start_metrics, self._start_metrics = self._start_metrics, {}
        if self.on_round is not None:
            self.on_round(
                replace(
                    record,
                    metrics=numbers,
                    start_metrics=start_metrics,
                    measured_round_s=time.perf_counter() - self._began,
                )
            )


def _log(record: Record) -> None:
    for line in record.lines():
        log(WARNING if record.skipped else INFO, "%s", line)
    warning = None if record.skipped else record.warning()
    if warning is not None:
        log(WARNING, "%s", warning)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
