"""A simulation on a Ray cluster of two hosts: network namespaces on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.testbed.network import (
    SERVER_ADDRESS,
    inside,
    network,
    why_unavailable,
)

pytestmark = [pytest.mark.testbed, pytest.mark.timeout(900)]

# Every device says which host it is on; the server counts hosts and answers.
APP = """
import logging
import os
import time

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()


@client.train()
def train(message, context):
    time.sleep(0.5)
    host = os.stat("/proc/self/ns/net").st_ino
    return Message(RecordDict({"at": MetricRecord({"host": host})}), reply_to=message)


@server.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 4:
        time.sleep(0.1)
    hosts = []
    for _ in range(3):
        sent = [Message(RecordDict(), node, "train") for node in nodes]
        replies = grid.send_and_receive(sent)
        hosts += [reply.content["at"]["host"] for reply in replies]
    log(logging.INFO, "final: hosts=%s answers=%s", len(set(hosts)), len(hosts))
"""
PROJECT = """
[project]
name = "where"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "lola-flwr"

[tool.flwr.app.components]
serverapp = "where:server"
clientapp = "where:client"
"""


def test_devices_compute_on_both_hosts(tmp_path):
    if (reason := why_unavailable()) is not None:
        pytest.skip(reason)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "where.py").write_text(APP)
    (tmp_path / "app" / "pyproject.toml").write_text(PROJECT)
    programs = Path(sys.executable).parent
    ray = str(programs / "ray")
    address = f"{SERVER_ADDRESS}:6379"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    # Sockets have short paths.
    directory = Path(f"/tmp/lola-ray-{os.getpid()}")

    def on(host, *command):
        done = subprocess.run(
            inside(host, command),
            env={**environment, "RAY_ADDRESS": address},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    start = (ray, "start", "--num-cpus=1", "--object-store-memory=100000000")
    try:
        with network([1e9]) as hosts:
            on(
                hosts.server,
                *(*start, "--head", f"--node-ip-address={SERVER_ADDRESS}"),
                *("--include-dashboard=false", f"--temp-dir={directory}"),
            )
            (device,) = hosts.devices
            address_of = ("--node-ip-address=10.201.1.2", f"--address={address}")
            on(device, *start, *address_of)
            printed = on(
                hosts.server,
                *(sys.executable, "-m", "lola_flwr.cli.main", "simulate"),
                *(str(tmp_path / "app"), "--engine", "ray", "--devices", "4"),
                *("--plain", "--home", str(tmp_path / "home")),
            )
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    assert printed.splitlines()[-1] == "final: hosts=2 answers=12"
