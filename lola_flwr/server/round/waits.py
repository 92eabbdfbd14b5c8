"""Who keeps a round waiting for longer than what it does explains.

A device that answers just before each deadline makes every round as long as may be.
What it computed and sent explains a part of its time, and so does what all devices wait
for: their programs' start, the model's way down. The rest is the device's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low

# Of the time that most devices needed, and seconds on top: below, it is chance.
_PART, _FLOOR_S = 0.5, 0.5


def unexplained_waits(
    answered_s: Mapping[str, float], explained_s: Mapping[str, float]
) -> dict[str, float]:
    """Return how long some devices kept a round waiting for no known reason.

    Parameters
    ----------
    answered_s
        Seconds from the round's messages to a device's reply, by device.
    explained_s
        Those in which it computed, as it reported, and sent, as was measured.

    Returns
    -------
    Seconds of those who did so for more than half of what the round takes most of them.
    """
    if not answered_s:
        return {}
    waited_s = {d: s - explained_s[d] for d, s in answered_s.items()}
    usual_s = median_low(waited_s.values())
    allowed_s = _PART * median_low(answered_s.values()) + _FLOOR_S
    return {d: s - usual_s for d, s in waited_s.items() if s - usual_s > allowed_s}
