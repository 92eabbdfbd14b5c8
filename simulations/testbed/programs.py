"""Programs of a testbed: where they are, what they find, and how they begin and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from simulations.testbed.network import SERVER_ADDRESS

_ROOT = Path(__file__).parents[2]
START_S, _STOP_S = 60.0, 20.0


class TestbedError(RuntimeError):
    """Something on the testbed did not come up; the message names its log."""

    __test__ = False


def make_keys(directory: Path, nodes: Sequence[str]) -> None:
    """Make an authority, the SuperLink's certificate and a key for each node."""
    script = str(_ROOT / "clients" / "linux" / "make-keys.sh")
    for arguments in (("server", SERVER_ADDRESS), ("node", *nodes)):
        done = subprocess.run(
            [script, str(directory), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise TestbedError(done.stderr.strip())


def environment_of(home: Path) -> dict[str, str]:
    """Return the environment of a program whose state is in a directory."""
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "LOLA_STATE_DIR": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "NO_PROXY": "*",
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def program(name: str) -> str:
    """Return one of the programs beside this Python."""
    return str(Path(sys.executable).with_name(name))


def wait_for(ready: Callable[[], bool], name: str, directory: Path) -> None:
    """Wait until a program is ready.

    Raises
    ------
    TestbedError
        It is not in the end.
    """
    deadline = time.monotonic() + START_S
    while not ready():
        if time.monotonic() > deadline:
            log = directory / f"{name}.log"
            raise TestbedError(f"{name} did not start; {log} says why.")
        time.sleep(0.2)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a program, without its consent at last."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
