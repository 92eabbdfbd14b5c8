"""How fast a run comes on: what its rounds bring over the time that they take."""

from __future__ import annotations

from dataclasses import dataclass

# What a round counts for after the next one: devices come and go, and models learn.
_KEPT = 0.95


@dataclass(frozen=True)
class Pace:
    """What the latest rounds brought, and how long they took.

    Parameters
    ----------
    progress
        What they brought, later ones more than earlier ones.
    seconds
        Their latencies, likewise.
    """

    progress: float = 0.0
    seconds: float = 0.0

    def after(self, progress: float | None, round_s: float) -> Pace:
        """Return the pace after a round; None: nobody has said what it brings."""
        if progress is None or not round_s > 0.0:
            return self
        return Pace(_KEPT * self.progress + progress, _KEPT * self.seconds + round_s)

    @property
    def a_second(self) -> float | None:
        """Progress a second; None without rounds."""
        return self.progress / self.seconds if self.seconds else None
