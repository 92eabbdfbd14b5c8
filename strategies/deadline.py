"""How long to wait for a round's replies, from its predicted latency.

Flower reports a device that died after about a minute, and one that hangs never. The
prediction counts seconds of the modelled system, the wait is by the wall clock: a
simulation runs faster or slower than what it simulates, and a deployment has start-up
times that no model knows. So their ratio is learned from the rounds that were complete.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_WINDOW = 10


class RoundDeadline:
    """Derives each round's deadline.

    Parameters
    ----------
    factor
        How many times as long as it should take a round may take.
    floor_s
        Seconds on top, which even the shortest round may take.
    """

    def __init__(self, factor: float, floor_s: float) -> None:
        self._factor = factor
        self._floor_s = floor_s
        self._wall_per_predicted: deque[float] = deque(maxlen=_WINDOW)

    def wait_s(self, predicted_s: float) -> float:
        """Return how long to wait; without end until a round has been complete."""
        if not self._wall_per_predicted:
            return math.inf
        usual_s = predicted_s * median(self._wall_per_predicted)
        return self._floor_s + self._factor * usual_s

    def learn(
        self, predicted_s: float, wall_s: float, *, asked: int, answered: int
    ) -> None:
        """Take in how long a round took.

        Parameters
        ----------
        predicted_s, wall_s
            Its predicted latency, and how long it took by the clock.
        asked, answered
            Devices that were asked, and that answered.
        """
        if answered >= asked:
            self._wall_per_predicted.append(wall_s / predicted_s)
        elif answered == 0:
            # Rather than by all of them the round was failed by its deadline.
            self._wall_per_predicted.clear()
