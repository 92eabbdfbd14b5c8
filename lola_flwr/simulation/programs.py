"""Programs that end with whoever started them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import IO

from lola_flwr.errors import UserError
from lola_flwr.simulation import guard

# How often what a program depends on is looked at, seconds.
_LOOK_S = 0.5


def program(name: str) -> str:
    """Find one of Flower's programs: beside this Python, or else on the PATH."""
    found = shutil.which(name, path=_search_path())
    if found is None:
        raise UserError(
            f"{name} is neither beside {sys.executable} nor on the PATH; run this with "
            "the Python of the environment that has flwr[simulation], such as "
            ".venv/bin/python after `make venv`."
        )
    return found


def _search_path() -> str:
    """Return the PATH of Flower's programs, which start each other by name."""
    # The link in a virtual environment, not the interpreter that it leads to.
    beside = Path(sys.executable).parent
    return f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def environment(flwr_home: Path) -> dict[str, str]:
    """Return the environment of programs that keep Flower's state in a directory."""
    return {
        **os.environ,
        "FLWR_HOME": str(flwr_home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        # Flower's programs start each other by name.
        "PATH": _search_path(),
        # Warnings about what Ray's driver inherits.
        "PYTHONWARNINGS": "ignore",
    }


@contextmanager
def running(
    command: Sequence[str], environment: dict[str, str], output: IO[bytes] | int
) -> Iterator[subprocess.Popen[str]]:
    """Start a program under a guard, which ends all of it with this process at last.

    Parameters
    ----------
    command
        The program and its arguments.
    environment
        Its environment.
    output
        Where its output goes.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # What a terminal sends to a group of processes is not for the guard.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        # A second Ctrl-C ends the waiting, and the guard goes on by itself.
        process.wait()


@dataclass(frozen=True)
class Streamed:
    """What a program printed, and how it ended.

    Parameters
    ----------
    output
        What it printed.
    exit_code
        Its guard's exit code.
    cause
        Why it was ended; None if it ended by itself.
    """

    output: str
    exit_code: int
    cause: str | None


def stream(
    command: Sequence[str],
    environment: dict[str, str],
    echo: Callable[[str], object] | None,
    cause: Callable[[], str | None] = lambda: None,
) -> Streamed:
    """Run a program and hand on each line that it prints, as it comes.

    Parameters
    ----------
    command, environment
        As for `running`.
    echo
        Called with each line.
    cause
        Asked every half second, in a thread of its own: why the program is to be
        ended; None if it is not.
    """
    lines: list[str] = []
    causes: list[str] = []
    done = Event()

    def watch(process: subprocess.Popen[str]) -> None:
        while not done.wait(_LOOK_S):
            if (found := cause()) is not None:
                causes.append(found)
                assert process.stdin is not None
                # Its guard ends it.
                process.stdin.close()
                return

    with running(command, environment, subprocess.PIPE) as process:
        assert process.stdout is not None
        watcher = Thread(target=watch, args=(process,), daemon=True)
        watcher.start()
        try:
            with process.stdout:
                for line in process.stdout:
                    lines.append(line)
                    if echo is not None:
                        echo(line)
        finally:
            done.set()
            watcher.join()
    return Streamed("".join(lines), process.returncode, next(iter(causes), None))
