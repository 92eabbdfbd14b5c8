"""A run on a SuperLink, started again where it was struck down, until it is complete.

Flower cannot go on with a run whose SuperLink or ServerApp was killed. The app can,
from its checkpoint, once somebody starts it again: here that is somebody.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from lola_flwr.simulation.finished import FinishedRun, plain
from lola_flwr.simulation.programs import program, stream
from lola_flwr.simulation.status import run_id_of, status_of

# Seconds from an end to the next start; twice as many after each start in vain.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 5.0, 60.0
# Starts that bring the run no round further, though the SuperLink is there.
_MOST_IN_VAIN = 3
_STOP_S = 30.0

_ROUND = re.compile(r"\[ROUND (\d+)")
_STOPPED = "finished:stopped"


def serve(
    app: Path,
    superlink: str,
    run_config: Sequence[str],
    echo: Callable[[str], object],
    *,
    first_wait_s: float = _FIRST_WAIT_S,
) -> FinishedRun:
    """Run an app to its end, however often it takes.

    It is started again where the run, or the connection to the SuperLink, has ended
    before it was complete. It is not where somebody stopped it, where the app says what
    is wrong before its first round, or after three starts that came no further.

    Parameters
    ----------
    app
        Directory of the app; its output directory is to be the same in all starts.
    superlink
        The SuperLink's name in Flower's configuration.
    run_config
        Overrides of the run configuration: ``'task="cola"'``.
    echo
        Called with each line of output as it comes, and with why it is started again.
    first_wait_s
        Seconds from an end to the next start.

    Raises
    ------
    UserError
        Flower's program is missing.
    """
    furthest, in_vain, unanswered = 0, 0, 0
    while True:
        finished = _start(app, superlink, run_config, echo)
        reached = _last_round(finished.output)
        if finished.completed or finished.status == _STOPPED:
            return finished
        is_there = "unavailable" not in finished.status
        if reached > furthest:
            furthest, in_vain, unanswered = reached, 0, 0
        elif is_there:
            in_vain, unanswered = in_vain + 1, 0
        else:
            unanswered += 1
        never_began = furthest == 0 and is_there
        if never_began or in_vain == _MOST_IN_VAIN:
            return finished
        wait_s = min(first_wait_s * 2 ** (in_vain + unanswered), _LONGEST_WAIT_S)
        why = finished.error or finished.status
        echo(f"lola-flwr serve: {why}; starting again in {wait_s:g} s\n")
        time.sleep(wait_s)


def _start(
    app: Path, superlink: str, run_config: Sequence[str], echo: Callable[[str], object]
) -> FinishedRun:
    """Start the run, and follow it until it, or the connection, ends."""
    command = [program("flwr"), "run", str(app), superlink, "--stream"]
    for override in run_config:
        command += ["--run-config", override]
    environment = dict(os.environ)
    lines: list[str] = []

    def heard(line: str) -> None:
        lines.append(line)
        echo(line)

    try:
        ran = stream(command, environment, heard)
    except KeyboardInterrupt:
        # The next start would find the directory taken.
        _stop(run_id_of("".join(lines)), superlink, environment)
        raise
    return FinishedRun(status_of(ran.output, superlink, environment), ran.output)


def _stop(run_id: str | None, superlink: str, environment: dict[str, str]) -> None:
    if run_id is None:
        return
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [program("flwr"), "stop", run_id, superlink],
            env=environment,
            capture_output=True,
            timeout=_STOP_S,
            check=False,
        )


def _last_round(output: str) -> int:
    return max(map(int, _ROUND.findall(plain(output))), default=0)
