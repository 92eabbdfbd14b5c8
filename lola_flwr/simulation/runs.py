"""Run a Flower app in Flower's engine, with a SuperLink of its own.

``flwr run`` leaves a managed SuperLink behind and reports success for runs that
failed. This starts a SuperLink for one run, checks how the run ended, and stops what it
started. ``lola-flwr simulate`` is this with a live display and a report.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lola_flwr.errors import UserError
from lola_flwr.machine.files import writing
from lola_flwr.simulation.finished import FinishedRun
from lola_flwr.simulation.flower_app import read_app
from lola_flwr.simulation.programs import (
    environment,
    program,
    running,
    stream,
)
from lola_flwr.simulation.ray_directory import ray_environment
from lola_flwr.simulation.status import status_of
from lola_flwr.simulation.watch import Watch, how_it_ended, is_signal

_START_S = 60.0


def run_app(
    app: Path,
    *,
    num_devices: int,
    run_config: Sequence[str] = (),
    home: Path,
    cpus_per_client: int = 1,
    echo: Callable[[str], object] | None = None,
) -> FinishedRun:
    """Run a Flower app in Flower's engine (Ray) and wait for its end.

    Parameters
    ----------
    app
        Directory of the app.
    num_devices
        Simulated SuperNodes.
    run_config
        Overrides of the run configuration: ``'task="cola"'``.
    home
        Where Flower keeps its state: the run's FLWR_HOME is a directory of its own
        in here, so that runs can go on at the same time.
    cpus_per_client
        CPUs that one client takes; as many clients as fit run at a time.
    echo
        Called with each line of output as it comes.

    Raises
    ------
    UserError
        There is no app, one of Flower's programs is missing, or the SuperLink did not
        start.
    """
    read_app(app)
    superexec, flwr = map(program, ("flower-superexec", "flwr"))
    with ray_environment() as for_ray, own_superlink(home) as link:
        # The SuperLink could start a SuperExec itself, but stopping it would leave the
        # simulation until the SuperLink has ended, too.
        superexec_command = [
            *(superexec, "--insecure", "--runtime-api-address", link.address),
            *("--parent-pid", str(os.getpid())),
        ]
        run_command = [
            *(flwr, "run", str(app), "own", "--stream", "--federation-config"),
            f"num-supernodes={num_devices} client-resources-num-cpus={cpus_per_client}",
        ]
        for override in run_config:
            run_command += ["--run-config", override]
        with (
            link.log.open("ab") as log_file,
            running(
                superexec_command, {**link.environment, **for_ray}, log_file
            ) as guard,
        ):
            watch = Watch(
                {"flower-superlink": link.guard, "flower-superexec": guard},
                superexec="flower-superexec",
                log=link.log,
            )
            ran = stream(run_command, link.environment, echo, watch.cause)
            cause = ran.cause or watch.cause()
            if cause is None and is_signal(ran.exit_code):
                cause = f"flwr run {how_it_ended(ran.exit_code)} before the run did."
            if cause is not None:
                return FinishedRun("failed", ran.output, cause)
            status = status_of(ran.output, "own", link.environment)
            return FinishedRun(status, ran.output)


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink that is up.

    Parameters
    ----------
    address
        Where it listens, on this machine only.
    environment
        Environment of programs that are to use it; they call it ``own``.
    log
        What it says.
    guard
        Its guard, which ends with it.
    """

    address: str
    environment: dict[str, str]
    log: Path
    guard: subprocess.Popen[str]


@contextmanager
def own_superlink(home: Path) -> Iterator[SuperLink]:
    """Start a SuperLink with an FLWR_HOME of its own, and stop it in the end.

    Parameters
    ----------
    home
        Directory for the FLWR_HOME.

    Raises
    ------
    UserError
        Flower's program is missing or did not start, or the directory cannot be
        written.
    """
    superlink = program("flower-superlink")
    port = _free_port()
    flwr_home = home.absolute() / f"run-{port}"
    address = f"127.0.0.1:{port}"
    with writing(flwr_home):
        flwr_home.mkdir(parents=True, exist_ok=True)
        (flwr_home / "config.toml").write_text(
            '[superlink]\ndefault = "own"\n\n[superlink.own]\n'
            f'address = "{address}"\ninsecure = true\n',
            encoding="utf-8",
        )
    own, log = environment(flwr_home), flwr_home / "superlink.log"
    command = [
        *(superlink, "--insecure", "--simulation", "--isolation", "process"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    with (
        log.open("ab") as log_file,
        running(command, own, log_file) as guard,
    ):
        _wait_for_port(guard, port, log)
        yield SuperLink(address, own, log, guard)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(superlink: subprocess.Popen[str], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and superlink.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise UserError(f"flower-superlink did not start; {log} says why.")
