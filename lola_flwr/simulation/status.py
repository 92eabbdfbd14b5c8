"""What a SuperLink says of a run."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Mapping

from lola_flwr.simulation.finished import plain
from lola_flwr.simulation.programs import program

_STATUS_S = 30.0


def run_id_of(output: str) -> str | None:
    """Return the id of the run that ``flwr run`` started; None if it started none."""
    found = re.search(
        r"^Successfully started run (\d+)", plain(output), flags=re.MULTILINE
    )
    return None if found is None else found[1]


def status_of(output: str, superlink: str, environment: Mapping[str, str]) -> str:
    """Ask a SuperLink how a run ended; ``flwr run``'s exit code does not tell.

    Parameters
    ----------
    output
        What ``flwr run`` printed.
    superlink
        The SuperLink's name in Flower's configuration.
    environment
        Environment of Flower's programs.

    Returns
    -------
    Flower's word for it, or ``"not started: ..."`` or ``"unknown: ..."`` and why.
    """
    run_id = run_id_of(output)
    if run_id is None:
        # Flower prints its errors in a box.
        reason = " ".join(re.findall("│ (.*?) *│", plain(output)))
        if "configuration" in reason:
            reason += (
                " Overrides are keys of [tool.flwr.app.config] in the app's "
                "pyproject.toml, and strings have quotes of their own: 'task=\"cola\"'."
            )
        return f"not started: {reason}"
    command = [program("flwr"), "list", superlink]
    command += ["--run-id", run_id, "--format", "json"]
    deadline = time.monotonic() + _STATUS_S
    while True:
        status = _listed_status(command, environment)
        # The last log line can arrive a moment before the run's end does.
        if status.startswith("finished") or time.monotonic() > deadline:
            return status
        time.sleep(0.5)


def _listed_status(command: list[str], environment: Mapping[str, str]) -> str:
    try:
        listed = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_STATUS_S,
        )
    except subprocess.TimeoutExpired:
        return f"unknown: `flwr list` took more than {_STATUS_S:g} s"
    try:
        return str(json.loads(listed.stdout)["runs"][0]["status"])
    except (ValueError, LookupError, TypeError):
        said = " ".join((listed.stdout + listed.stderr).split())
        return f"unknown: `flwr list` says {said[-300:]!r}"
