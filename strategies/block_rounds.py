"""A coordinator's rounds: what devices are sent, and how long they are waited for."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median_low
from typing import Any, TypeVar

import numpy.typing as npt

from lola_flwr.run.records import RoundRecord
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.strategies.deadline import RoundDeadline
from lola_flwr.strategies.rounds import OnRound, Rounds, Waits
from lola_flwr.wire.packing import MOVES, VALUES
from lola_flwr.wire.records import MANIFEST_KEY, holds_nothing

Encoded = TypeVar("Encoded")

# Of so many rounds the one in the middle tells what the server takes itself: the first
# waits for devices, and others evaluate.
_LATEST_ROUNDS = 5


class BlockRounds(Rounds[RoundPlan, Iterable[DeviceReply]]):
    """Carries a coordinator's rounds out.

    Parameters
    ----------
    coordinator
        Plans and completes the rounds.
    min_available
        As for `Rounds` (default: as many as the model has blocks, if they come).
    waits, on_round
        As for `Rounds`.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        min_available: int | None,
        waits: Waits,
        on_round: OnRound | None,
    ) -> None:
        blocks = coordinator.partition.num_blocks
        super().__init__(
            coordinator,
            min_available=blocks if min_available is None else min_available,
            enough=1 if min_available is None else None,
            waits=waits,
            on_round=on_round,
            why=f" (the model has {blocks} blocks)",
        )
        self._coordinator = coordinator
        self._deadline = (
            RoundDeadline(waits.deadline_factor, waits.deadline_floor_s)
            if waits.deadline_factor
            else None
        )
        self._sent_at = 0.0
        # What the present round's replies may take, as it was asked for last.
        self._longest_s = math.inf
        # Seconds to the present round's last reply, and what rounds took beside theirs.
        self._answered_s: float | None = None
        self._beside_s: deque[float] = deque(maxlen=_LATEST_ROUNDS)
        # Devices whose updates the last round could use.
        self.accepted: frozenset[str] = frozenset()
        # Devices that said they complete messages of evaluation, too.
        self._completing: set[str] = set()

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
            weights are sent these, all others values in one array, and changes in
            another: of what their manifest says, or all trainable values.
        encode
            Encodes an array. Devices that are sent the same share what it returns.
        """
        self._sent_at, self._longest_s = time.monotonic(), math.inf
        packed: dict[tuple[str, tuple[str, ...]], Encoded] = {}
        pack: dict[str, Callable[[Sequence[str]], npt.NDArray[Any]]] = {
            VALUES: partial(self._coordinator.packed, codec=plan.whole_codec),
            MOVES: self._coordinator.packed_moves,
        }
        for device in plan.assignments:
            names = plan.sent_names(device, [*encoded])
            if self._coordinator.sends_by_name:
                yield device, {name: encoded[name] for name in names}
                continue
            moved = plan.moved_names(device, [*encoded])
            sent = {}
            for key, of in ((VALUES, names), (MOVES, moved)):
                if of and (key, of) not in packed:
                    packed[key, of] = encode(pack[key](of))
                if of:
                    sent[key] = packed[key, of]
            yield device, sent

    def evaluation_contents(
        self, devices: Sequence[str], encoded: Mapping[str, Encoded]
    ) -> Iterator[tuple[str, dict[str, Encoded], dict[str, str]]]:
        """Give each device that evaluates, the arrays that it is sent, and their words.

        Parameters
        ----------
        devices
            The devices.
        encoded
            All arrays of the coordinator, as it has them now, encoded for the wire.
        """
        completing = [device for device in devices if device in self._completing]
        manifests = self._coordinator.evaluation_manifests(completing)
        for device in devices:
            manifest = manifests.get(device)
            if manifest is None:
                yield device, {**encoded}, {}
            else:
                names = manifest.sent_names([*encoded])
                sent = {name: encoded[name] for name in names}
                yield device, sent, {MANIFEST_KEY: manifest.to_text()}

    def wait_s(self, came_s: Sequence[float] = (), failed: int = 0) -> float:
        """Return how long the replies to the present round may take; else infinity.

        Parameters
        ----------
        came_s
            After how many seconds those came that are there.
        failed
            Devices that said they failed.
        """
        plan = self._plan
        if plan is None or self._deadline is None:
            return math.inf
        planned_s = [*plan.planned_s.values()]
        self._longest_s = self._deadline.wait_s(
            plan.allocation.round_s, planned_s, came_s, failed
        )
        return self._longest_s

    def complete(self, answers: Iterable[DeviceReply]) -> dict[str, float] | None:
        """Take the round's replies in; return its figures, or None if skipped."""
        replies, plan = list(answers), self._plan
        answered_s = [r.answered_s for r in replies if r.answered_s is not None]
        self._answered_s = max(answered_s, default=None)
        if plan is not None and self._deadline is not None:
            now_s = time.monotonic() - self._sent_at
            failed = {r.device_id for r in replies if holds_nothing(r.report)}
            came_s = {r.device_id: r.answered_s or now_s for r in replies}
            trained_s = [s for device, s in came_s.items() if device not in failed]
            asked = len(plan.assignments.keys() - failed)
            self._deadline.learn(plan.allocation.round_s, trained_s, asked=asked)
        self.accepted = frozenset()
        figures = super().complete(replies)
        if plan is not None and isinstance(self._record, RoundRecord):
            has_end = math.isfinite(self._longest_s)
            self._record = replace(
                self._record,
                measured_deadline_s=self._longest_s if has_end else None,
                server_s=median_low(self._beside_s or (0.0,)),
            )
            used = {b.device for b in self._record.blocks if b.status == "accepted"}
            self.accepted = frozenset(
                device for device, p in plan.profiles.items() if p.name in used
            )
        for reply in replies:
            completes = reply.report.get("completes") is True
            (self._completing.add if completes else self._completing.discard)(
                reply.device_id
            )
        return figures

    def report(self, server_round: int, metrics: Mapping[str, object]) -> None:
        """Hand on the round's record, as `Rounds` does, and learn what it took here."""
        super().report(server_round, metrics)
        answered_s, self._answered_s = self._answered_s, None
        if answered_s is not None:
            self._beside_s.append(time.perf_counter() - self._began - answered_s)
