"""A SuperLink and SuperNodes with TLS and keys of their own, on a testbed's network."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lola_flwr.deployment.pacing import chunk_bytes
from simulations.testbed.network import SERVER_ADDRESS, Network, inside
from simulations.testbed.options import Options
from simulations.testbed.programs import (
    START_S,
    TestbedError,
    environment_of,
    make_keys,
    program,
    stop,
    wait_for,
)

_PORT = 8000
_SUPERLINK = f"{SERVER_ADDRESS}:{_PORT}"
_RELAY = "127.0.0.1:9095"
# A rough guess: what devices report of their times corrects it.
_CLAIMED = "flops-per-s=1e10 memory-bytes=4e9 snr-db=10.0"
# RestartSec of clients/linux/lola-supernode.service and lola-worker.service.
_RESTART_S, _WORKER_RESTART_S = 5.0, 2.0


@dataclass
class Federation:
    """A running federation.

    Parameters
    ----------
    network
        What it runs on.
    directory
        Its keys, logs and state.
    options
        What its devices do.
    """

    network: Network
    directory: Path
    options: Options
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        """Make keys, and start the SuperLink, the workers and the SuperNodes."""
        names = [f"node-{index}" for index in range(len(self.network.devices))]
        make_keys(self.directory / "keys", names)
        self.start_superlink()
        for name in names:
            self.flwr("supernode", "register", str(self._key(name)) + ".pub", "testbed")
        for index in range(len(names)):
            self.start_device(index)

    def start_device(self, index: int) -> None:
        """Start a device's worker and its SuperNode."""
        if self.options.worker:
            self.start_worker(index)
        self.start_supernode(index)

    def start_supernode(self, index: int) -> None:
        """Start a device's SuperNode."""
        home, relayed = self._home(index), self.options.limit == "pacing"
        node_config = f"partition-id={index} num-partitions={len(self.network.devices)}"
        if self.options.worker:
            node_config += f' worker="{home / "worker.sock"}"'
        if self.options.measured:
            node_config += f' name="device-{index:04d}" {_CLAIMED}'
        command = [
            *(program(self.options.node[0]), *self.options.node[1:], "--superlink"),
            _RELAY if relayed and self.options.worker else _SUPERLINK,
            *("--root-certificates", str(self.directory / "keys" / "ca.crt")),
            *("--auth-supernode-private-key", str(self._key(f"node-{index}"))),
            *("--node-config", node_config),
        ]
        self._start(
            f"supernode-{index}",
            self.network.devices[index],
            command,
            home,
            FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE=str(
                chunk_bytes(self.network.rates_bps[index])
            ),
            FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.1",
        )

    def start_worker(self, index: int) -> None:
        """Start a device's worker."""
        home, name = self._home(index), f"worker-{index}"
        command = [
            *(sys.executable, "-m", "lola_flwr.deployment.serve_worker"),
            *("--socket", str(home / "worker.sock"), "--superlink", _SUPERLINK),
            # One run follows the other at once.
            *("--hold-s", "0"),
            *{
                "pacing": ("--relay", _RELAY),
                "tc": ("--tc", "uplink"),
                "none": (),
            }[self.options.limit],
        ]
        self._start(name, self.network.devices[index], command, home)
        wait_for((home / "worker.sock").exists, name, self.directory)

    def start_superlink(self) -> None:
        """Start the SuperLink."""
        keys, home = self.directory / "keys", self.directory / "server"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "testbed"\n\n[superlink.testbed]\n'
            f'address = "{_SUPERLINK}"\n'
            f'root-certificates = "{keys / "ca.crt"}"\n',
            encoding="utf-8",
        )
        command = [
            *(program("flower-superlink"), "--host", "0.0.0.0", "--port", str(_PORT)),
            *("--ssl-ca-certfile", str(keys / "ca.crt")),
            *("--ssl-certfile", str(keys / "server.crt")),
            *("--ssl-keyfile", str(keys / "server.key")),
            "--enable-supernode-auth",
        ]
        if self.options.keeps_state:
            command += ["--database", str(home / "state.db")]
        self._start("superlink", self.network.server, command, home)
        probe = inside(
            self.network.server,
            [sys.executable, "-c", _PROBE, SERVER_ADDRESS, str(_PORT)],
        )
        wait_for(
            lambda: subprocess.run(probe, capture_output=True).returncode == 0,
            "superlink",
            self.directory,
        )

    def kill(self, name: str) -> None:
        """Kill a program and what it started, without warning."""
        process = self._processes[name]
        # As systemd does with a unit's control group, whatever sessions are in it.
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def follow_worker(self, index: int) -> None:
        """Start a device's worker again once it has ended, as its unit does.

        Raises
        ------
        TestbedError
            It did not end.
        """
        name = f"worker-{index}"
        try:
            self._processes[name].wait(timeout=START_S)
        except subprocess.TimeoutExpired:
            raise TestbedError(f"{name} did not end.") from None
        time.sleep(_WORKER_RESTART_S)
        self.start_worker(index)

    def freeze(self, name: str) -> None:
        """Stop a program where it is, without its knowledge."""
        os.killpg(self._processes[name].pid, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Let a program that was stopped go on."""
        os.killpg(self._processes[name].pid, signal.SIGCONT)

    def programs(self) -> dict[str, int]:
        """Return the process ids of all programs that run, by name."""
        return {name: each.pid for name, each in list(self._processes.items())}

    def restart_supernode(self, index: int) -> int:
        """Start a killed SuperNode again and again, as its unit does, until it stays.

        Flower refuses a node that it still believes to be there: until two of its
        heartbeats are missing.

        Returns
        -------
        How often it was refused.
        """
        name, refused = f"supernode-{index}", 0
        while True:
            time.sleep(_RESTART_S)
            self.start_supernode(index)
            try:
                self._processes[name].wait(timeout=START_S / 2)
            except subprocess.TimeoutExpired:
                return refused
            refused += 1
            self.kill(name)  # what it has started stays

    def flwr(self, *arguments: str) -> str:
        """Run a command of ``flwr`` on the server; return what it prints.

        Raises
        ------
        TestbedError
            It failed.
        """
        done = subprocess.run(
            inside(self.network.server, [program("flwr"), *arguments]),
            env=self.environment(self.directory / "server"),
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split())[-500:]
            raise TestbedError(f"flwr {' '.join(arguments)}: {said}")
        return done.stdout

    def run(
        self,
        app: Path,
        overrides: Sequence[str],
        *,
        echo: Callable[[str], object] = lambda line: None,
    ) -> dict[str, Any]:
        """Run an app to its end; return what ``flwr list`` says of it.

        Parameters
        ----------
        app
            Directory of the app.
        overrides
            Overrides of its configuration.
        echo
            Called with each line of output as it comes.
        """
        command = [program("flwr"), "run", str(app), "testbed", "--stream"]
        for override in overrides:
            command += ["--run-config", override]
        _, output = self._follow(command, echo)
        found = re.search(r"Successfully started run (\d+)", output)
        if found is None:
            raise TestbedError(f"The run did not start: {output[-1000:]}")
        return self.listed(found[1])

    def serve(
        self,
        app: Path,
        overrides: Sequence[str],
        *,
        echo: Callable[[str], object] = lambda line: None,
    ) -> int:
        """Run an app with ``lola-flwr serve``, to its end; return the exit code.

        Parameters
        ----------
        app, overrides, echo
            As for `run`; overrides' strings need no quotes.
        """
        command = [program("lola-flwr"), "serve", str(app), "testbed", *overrides]
        code, _ = self._follow(command, echo)
        return code

    def listed(self, run_id: str) -> dict[str, Any]:
        """Return what ``flwr list`` says of a run, once it has ended.

        Raises
        ------
        TestbedError
            The SuperLink does not know, or is not there.
        """
        deadline = time.monotonic() + START_S
        while True:
            printed = self.flwr(
                "list", "testbed", "--run-id", run_id, "--format", "json"
            )
            runs = json.loads(printed).get("runs")
            # It exits with 0 where the SuperLink does not answer, too.
            if not runs:
                raise TestbedError(f"flwr list: {' '.join(printed.split())[-500:]}")
            run: dict[str, Any] = runs[0]
            if run["status"].startswith("finished") or time.monotonic() > deadline:
                return run
            time.sleep(0.5)

    def stop(self) -> None:
        """Stop all; what others connect to comes after them."""
        order = ("run", "supernode", "worker", "superlink")
        for kind in order:
            for name, process in self._processes.items():
                if name.partition("-")[0] == kind:
                    stop(process)
        self._processes.clear()

    # --- parts -----------------------------------------------------------------------

    def _follow(
        self, command: Sequence[str], echo: Callable[[str], object]
    ) -> tuple[int, str]:
        process = subprocess.Popen(
            inside(self.network.server, command),
            env=self.environment(self.directory / "server"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes["run"] = process  # type: ignore[assignment]
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            echo(line)
        code = process.wait()
        del self._processes["run"]
        return code, "".join(lines)

    def _start(
        self,
        name: str,
        namespace: str,
        command: Sequence[str],
        home: Path,
        **environment: str,
    ) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                inside(namespace, command),
                env={**self.environment(home), **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _home(self, index: int) -> Path:
        home = self.directory / f"device-{index}"
        home.mkdir(exist_ok=True)
        return home

    def _key(self, name: str) -> Path:
        return self.directory / "keys" / "nodes" / name

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a program whose state is in a directory."""
        return {**environment_of(home), **self.options.environment}


_PROBE = (
    "import socket, sys; "
    "socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()"
)


@contextmanager
def federation(
    network: Network, directory: Path, options: Options
) -> Iterator[Federation]:
    """Start a federation, and stop it in the end."""
    started = Federation(network, directory, options)
    try:
        started.start()
        yield started
    finally:
        started.stop()
