"""Devices that failed lately are asked again, but after an ever longer rest.

A device that does not answer, or whose answer is of no use, rests for one round, then
for two, four and so on. A device that ran out of memory rests from blocks of that size
only. Nobody is banned: a rest ends by itself, and before a round could not take place
at all, rests are ended early.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

# A device that always fails still costs a block one round in so many.
_LONGEST_REST = 32
# What being distrusted counts.
_FAILURES_OF_DISTRUSTED = 2


@dataclass(frozen=True)
class Absence:
    """How often a device failed, and what it is spared for that.

    Parameters
    ----------
    failures
        Failures that have not been made up for; a useful update halves them.
    until_round
        First round in which it counts fully again.
    memory_bytes
        Until then it gets no block that needs as much memory; 0: no block at all.
    """

    failures: int
    until_round: int
    memory_bytes: float = 0.0


_NONE = Absence(0, 0)


@dataclass(frozen=True)
class Absences:
    """Who failed lately.

    Parameters
    ----------
    of_device
        By the device's name.
    """

    of_device: Mapping[str, Absence] = field(default_factory=dict)

    def after(
        self,
        server_round: int,
        outcomes: Mapping[str, float | None],
        distrusted: Collection[str] = (),
    ) -> Absences:
        """Return the absences after a round.

        Parameters
        ----------
        server_round
            The round that is complete.
        outcomes
            For each device that was asked: None if its update was accepted, else the
            memory in bytes that it turned out not to have, or 0 for any other failure.
        distrusted
            Those that failed in that they are not trusted. Each trial wastes a part of
            a round, so these rest longer from the first time on.
        """
        devices = dict(self.of_device)
        for device, lacked_bytes in outcomes.items():
            before = devices.pop(device, _NONE)
            if lacked_bytes is not None:
                failed = _FAILURES_OF_DISTRUSTED if device in distrusted else 1
                failures = before.failures + failed
                rest = min(2 ** (failures - 1), _LONGEST_REST)
                until = server_round + 1 + rest
                devices[device] = Absence(failures, until, lacked_bytes)
            elif server_round < before.until_round:
                # It was asked early, or for less than what it failed at.
                devices[device] = before
            elif before.failures > 1:
                # One good round does not outweigh many bad ones.
                devices[device] = Absence(before.failures // 2, 0)
        return Absences(devices)

    def memory_limit(self, server_round: int, device: str) -> float:
        """Return the bytes below which a device's blocks must stay in a round."""
        absence = self.of_device.get(device, _NONE)
        return absence.memory_bytes if server_round < absence.until_round else math.inf

    def failures(self, device: str) -> int:
        """Return how often a device failed, as ``Absence`` counts it."""
        return self.of_device.get(device, _NONE).failures
