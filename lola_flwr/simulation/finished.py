"""How a simulated run ended."""

from __future__ import annotations

import re
from dataclasses import dataclass

# How Flower logs what ended a simulation. Of errors that led to each other the first
# one comes first.
_RAISED = re.compile(
    r"^ERROR *: +Simulation raised an exception\n"
    r"Traceback \(most recent call last\):\n(?:[ \t].*\n)*(\S.*)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class FinishedRun:
    """How a run ended.

    Parameters
    ----------
    status
        Flower's word for it: ``"finished:completed"`` is success.
    output
        What the run printed.
    cause
        What ended it, in a line, where the output does not say; None if nothing did.
    """

    status: str
    output: str
    cause: str | None = None

    @property
    def completed(self) -> bool:
        """Whether the run completed."""
        return self.status == "finished:completed"

    @property
    def final(self) -> str | None:
        """The app's summary line."""
        return self._last_logged("INFO", "final: ")

    @property
    def error(self) -> str | None:
        """The one line that the app reported a user's mistake with.

        Of another error, its own line, which stands at the end of its traceback.
        """
        logged = self._last_logged("ERROR", "error: ")
        if logged is not None:
            return logged.removeprefix("error: ")
        raised = _RAISED.findall(plain(self.output))
        return raised[-1] if raised else self.cause

    def _last_logged(self, level: str, start: str) -> str | None:
        # Other lines hold what devices call themselves, which could be anything.
        logged = re.findall(
            rf"^{level} *: +({start}.+)$", plain(self.output), re.MULTILINE
        )
        return logged[-1] if logged else None


def plain(output: str) -> str:
    """Return what a program printed, without the colors."""
    return re.sub(r"\x1b\[[0-9;]*m", "", output)
