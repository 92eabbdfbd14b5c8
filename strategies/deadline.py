"""How long to wait for a round's replies: as long as most devices need, several times.

Flower reports a device that died after about a minute, and one that hangs never. The
prediction counts seconds of the modelled system, the wait is by the wall clock: a
simulation runs faster or slower than what it simulates, and a deployment has start-up
times that no model knows. So their ratio is learned, from the half of the devices that
answer first: no minority moves it by being late.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

_WINDOW = 10
# After a round that most devices were too late for, the next is given twice as long.
_LONGEST_STRETCH = 16.0


class RoundDeadline:
    """Derives each round's deadline.

    Parameters
    ----------
    factor
        How many times as long as it takes most devices a round may take.
    floor_s
        Seconds on top, which even the shortest round may take; the fewer, the more
        rounds are known, down to a tenth.
    """

    def __init__(self, factor: float, floor_s: float) -> None:
        self._factor = factor
        self._floor_s = floor_s
        self._wall_per_predicted: deque[float] = deque(maxlen=_WINDOW)
        self._stretch = 1.0

    def wait_s(
        self,
        predicted_s: float,
        planned_s: Sequence[float] = (),
        came_s: Sequence[float] = (),
        failed: int = 0,
    ) -> float:
        """Return how long to wait for all of a round's replies.

        Parameters
        ----------
        predicted_s
            The round's predicted latency.
        planned_s
            What each device that was asked should take of it.
        came_s
            After how many seconds those replies came that are there.
        failed
            Devices that said they failed, which tells nothing of the others' time.

        Returns
        -------
        Seconds; infinite before a round is known, until half of the devices answered.
        """
        longest_s = math.inf
        if self._wall_per_predicted:
            usual_s = predicted_s * median(self._wall_per_predicted)
            longest_s = self._limit_s(usual_s) * self._stretch
        most_s = time_of_most(came_s, len(planned_s) - failed)
        if most_s is not None:
            # The first half may be those that were given least to do.
            later_s = max(predicted_s - median(planned_s), 0.0)
            longest_s = min(longest_s, self._limit_s(most_s + later_s))
        return longest_s

    def learn(self, predicted_s: float, came_s: Iterable[float], *, asked: int) -> None:
        """Take in how long a round took.

        Parameters
        ----------
        predicted_s
            Its predicted latency.
        came_s
            After how many seconds the replies came that did.
        asked
            Devices that were asked, and did not say that they failed.
        """
        most_s = time_of_most([*came_s], asked)
        if most_s is None:
            # Rather than by most of them the round was failed by its deadline.
            self._stretch = min(2.0 * self._stretch, _LONGEST_STRETCH)
            return
        self._stretch = 1.0
        self._wall_per_predicted.append(most_s / predicted_s)

    def _limit_s(self, usual_s: float) -> float:
        known = max(len(self._wall_per_predicted), 1)
        return self._floor_s / known + self._factor * usual_s


def time_of_most(came_s: Sequence[float], asked: int) -> float | None:
    """Return when half of the devices had answered; None where fewer have."""
    needed = (asked + 1) // 2
    return sorted(came_s)[needed - 1] if 0 < needed <= len(came_s) else None
