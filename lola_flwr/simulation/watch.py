"""What has ended of the programs that a simulation needs, and how."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lola_flwr.simulation.guard import children, status_of

_NUM_SIGNALS = 64


@dataclass
class Watch:
    """Says which program of a run has ended before the run did.

    Parameters
    ----------
    guarded
        Programs that are needed to the end, by name: their guards.
    superexec
        The one of them that starts the process of ServerApp and devices.
    log
        What they say.
    """

    guarded: Mapping[str, subprocess.Popen[str]]
    superexec: str
    log: Path
    _started: int | None = None

    def cause(self) -> str | None:
        """Return what has ended, and how; None while all live."""
        for name, guard in self.guarded.items():
            code = guard.poll()
            if code is not None:
                return f"{name} {how_it_ended(code)}; {self.log} says more."
        return self._of_simulation()

    def _of_simulation(self) -> str | None:
        table = children()
        guard = self.guarded[self.superexec]
        under = table.get(guard.pid, ())
        if self._started is None:
            # The first that a guard has is the program; orphans are adopted later.
            self._started = next(iter(under), None)
        if self._started is None:
            return None
        if self._started not in under or status_of(self._started) is not None:
            # Its guard first ends what it has left.
            return (
                f"{self.superexec} {how_it_ended(guard.wait())}; {self.log} says more."
            )
        # Nobody asks how the process ended: the system keeps it until SuperExec ends.
        # One that ends by itself has told the SuperLink why.
        for code in map(status_of, table.get(self._started, ())):
            if code is not None and code < 0:
                return (
                    f"The process of ServerApp and devices {how_it_ended(code)}; "
                    f"{self.log} says more."
                )
        return None


def is_signal(code: int) -> bool:
    """Whether it was a signal that ended a program of an exit code."""
    return code < 0 or 256 - _NUM_SIGNALS <= code < 256


def how_it_ended(code: int) -> str:
    """Say how a program ended, by the exit code of its guard or its own.

    Parameters
    ----------
    code
        Negative for a signal, or that in eight bits.
    """
    if not is_signal(code):
        return f"ended with exit code {code}"
    number = -code if code < 0 else 256 - code
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    why = ", as by a system short of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{why}"
