"""Run a Flower app in the simulation engine, with a SuperLink of its own.

``flwr run`` leaves a managed SuperLink behind and reports success for runs that
failed. This starts a SuperLink for one run, checks how the run ended, and stops what it
started.

    python simulations/run.py simulations/glue --devices 6 'task="sst-2"' 'rounds=30'
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_SUPERLINK_START_S = 60.0


@dataclass(frozen=True)
class FinishedRun:
    """How a run ended.

    Parameters
    ----------
    status
        Flower's word for it: ``"finished:completed"`` is success.
    output
        What the run printed.
    """

    status: str
    output: str

    @property
    def completed(self) -> bool:
        """Whether the run completed."""
        return self.status == "finished:completed"

    @property
    def final(self) -> str | None:
        """The app's summary line."""
        found = re.search(r"final: .+", self.output)
        return found[0] if found else None

    @property
    def error(self) -> str | None:
        """The one line that the app reported a user's mistake with."""
        found = re.search(r"error: (.+)", self.output)
        return found[1] if found else None


def run_app(
    app: Path,
    *,
    num_devices: int,
    run_config: Sequence[str] = (),
    home: Path,
    cpus_per_client: float = 1,
    echo: Callable[[str], object] | None = None,
) -> FinishedRun:
    """Run a Flower app in simulation and wait for its end.

    Parameters
    ----------
    app
        Directory of the app.
    num_devices
        Simulated SuperNodes.
    run_config
        Overrides of the run configuration: ``'task="cola"'``.
    home
        FLWR_HOME of the run: Flower keeps its state here.
    cpus_per_client
        CPUs that one client takes; as many clients as fit run at a time.
    echo
        Called with each line of output as it comes.
    """
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "own"\n\n[superlink.own]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # Ray's own usage statistics, and warnings about what its driver inherits.
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONWARNINGS": "ignore",
    }
    with (home / "superlink.log").open("ab") as superlink_log:
        superlink = subprocess.Popen(
            [
                *("flower-superlink", "--insecure", "--simulation"),
                *("--isolation", "subprocess", "--host", "127.0.0.1"),
                *("--port", str(port)),
            ],
            env=environment,
            stdout=superlink_log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_for_port(superlink, port, home / "superlink.log")
            output = _stream_run(
                app, num_devices, run_config, cpus_per_client, environment, echo
            )
            return FinishedRun(_status(output, environment), output)
        finally:
            superlink.terminate()
            superlink.wait()


def _stream_run(
    app: Path,
    num_devices: int,
    run_config: Sequence[str],
    cpus_per_client: float,
    environment: dict[str, str],
    echo: Callable[[str], object] | None,
) -> str:
    federation = (
        f"num-supernodes={num_devices} client-resources-num-cpus={cpus_per_client}"
    )
    command = ["flwr", "run", str(app), "own", "--stream"]
    command += ["--federation-config", federation]
    for override in run_config:
        command += ["--run-config", override]
    lines = []
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if echo is not None:
                echo(line)
    return "".join(lines)


def _status(output: str, environment: dict[str, str]) -> str:
    """Ask the SuperLink how the run ended; the stream's exit code does not tell."""
    found = re.search(r"run (\d{6,})", output)
    if found is None:
        return "not started"
    command = ["flwr", "list", "own", "--run-id", found[1], "--format", "json"]
    deadline = time.monotonic() + 30
    while True:
        listed = subprocess.run(
            command, env=environment, capture_output=True, text=True
        )
        runs = json.loads(listed.stdout)["runs"]
        status = str(runs[0]["status"])
        # The last log line can arrive a moment before the run's end does.
        if status.startswith("finished") or time.monotonic() > deadline:
            return status
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(superlink: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _SUPERLINK_START_S
    while time.monotonic() < deadline and superlink.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"flower-superlink did not start; see {log}")


def main() -> int:
    """Run from the command line; the exit code tells whether the run completed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("app", type=Path)
    parser.add_argument("overrides", nargs="*", help="run-config, as 'rounds=30'")
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--home", type=Path, default=Path("runs/flwr-home"))
    parser.add_argument("--cpus-per-client", type=float, default=1)
    arguments = parser.parse_intermixed_args()
    finished = run_app(
        arguments.app,
        num_devices=arguments.devices,
        run_config=arguments.overrides,
        home=arguments.home,
        cpus_per_client=arguments.cpus_per_client,
        echo=sys.stdout.write,
    )
    if finished.completed:
        print(finished.final or "completed")
        return 0
    print(f"error: {finished.error or f'the run ended as {finished.status!r}'}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
