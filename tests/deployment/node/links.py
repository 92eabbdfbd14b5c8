"""A SuperLink on the loopback, and nodes of either kind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(home):
    home.mkdir(exist_ok=True)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Link:
    """A SuperLink on the loopback."""

    def __init__(self, directory, *options, is_secure=False):
        self.port, self.directory = free_port(), directory
        self.home = directory / "link"
        self.environment = environment(self.home)
        (self.home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.programs = []
        options = [*map(str, options)] if is_secure else ["--insecure"]
        self.start(["flower-superlink", *options, "--port", str(self.port)], self.home)
        wait_until(self.answers)

    def answers(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start(self, words, home):
        with (self.directory / f"{words[0]}.log").open("ab") as log:
            program = subprocess.Popen(
                [str(BIN / words[0]), *words[1:]],
                env=environment(home),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.programs.append(program)
        return program

    def node(self, program, *words, partition=(7, 9)):
        address = f"127.0.0.1:{self.port}"
        words = ["--insecure", "--superlink", address, *words]
        index, count = partition
        words += ["--node-config", f"partition-id={index} num-partitions={count}"]
        return self.start([*program, *words], self.directory / f"{program[0]}-{index}")

    def run(self, app, *settings, wait=True):
        command = [str(BIN / "flwr"), "run", str(app), "here", "--stream"]
        for setting in settings:
            command += ["--run-config", setting]
        process = subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL
        )
        if wait:
            assert process.wait(timeout=300) == 0
        return process

    def stop(self, programs=None):
        for program in reversed(self.programs if programs is None else programs):
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGTERM)
                program.wait(timeout=60)
