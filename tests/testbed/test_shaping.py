from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lola_flwr.deployment.processes import ProcessId, _stat
from simulations.testbed.network import SERVER_ADDRESS, inside, network, why_unavailable

pytestmark = pytest.mark.testbed

HOLD = """
import sys, time
from pathlib import Path
from lola_flwr.deployment.shaping import TrafficControl
superlink, state, limit_bps = sys.argv[1:]
control = TrafficControl("uplink", superlink + ":7000", state_directory=Path(state))
print(control.hold_to(float(limit_bps), 1), flush=True)
sys.stdin.read()
control.close()
"""
RECEIVE = """
import socket, sys, time
with socket.create_server(("0.0.0.0", int(sys.argv[1]))) as listening:
    print("ready", flush=True)
    connection, _ = listening.accept()
    count, start = 0, time.monotonic()
    while data := connection.recv(65536):
        count += len(data)
    print(8 * count / (time.monotonic() - start))
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    connection.sendall(bytes(int(sys.argv[3])))
"""


@pytest.fixture
def link():
    reason = why_unavailable()
    if reason:
        pytest.skip(reason)
    with network([20e6]) as made:
        yield made


def queue(link):
    shown = subprocess.run(
        ["tc", "-n", link.devices[0], "-j", "qdisc", "show", "dev", "uplink"],
        capture_output=True,
        check=True,
    )
    found = json.loads(shown.stdout)[0]
    return found["kind"], found.get("options", {}).get("rate")


def rate_bps(link, port, count=1_000_000):
    """Send to the server, and return the rate at which it arrives."""
    receive = [sys.executable, "-c", RECEIVE, str(port)]
    send = [sys.executable, "-c", SEND, SERVER_ADDRESS, str(port), str(count)]
    with subprocess.Popen(
        inside(link.server, receive), stdout=subprocess.PIPE, text=True
    ) as receiver:
        assert receiver.stdout.readline() == "ready\n"
        subprocess.run(inside(link.devices[0], send), check=True)
        return float(receiver.stdout.readline())


def holding(link, tmp_path, limit_bps):
    command = [
        sys.executable,
        "-c",
        HOLD,
        SERVER_ADDRESS,
        str(tmp_path),
        str(limit_bps),
    ]
    process = subprocess.Popen(
        inside(link.devices[0], command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def test_only_what_goes_to_the_superlink_is_limited(link, tmp_path):
    # More than the link, so that the queue's own rate does not hide the limit.
    before = queue(link)
    process, held_by = holding(link, tmp_path, 4e6)
    assert held_by == "tc"
    assert queue(link)[0] == "htb"
    assert rate_bps(link, 7000) < 4.4e6
    assert rate_bps(link, 7001, 4_000_000) > 4e7
    process.communicate("")
    assert process.returncode == 0
    assert queue(link) == before == ("tbf", 2_500_000)
    assert not list(tmp_path.iterdir())


def test_the_next_start_puts_back_what_a_killed_worker_found(link, tmp_path):
    before = queue(link)
    process, _ = holding(link, tmp_path, 4e6)
    process.kill()
    process.communicate()
    assert queue(link)[0] == "htb"
    again, held_by = holding(link, tmp_path, 2e6)
    assert held_by == "tc"
    again.communicate("")
    assert queue(link) == before


def test_two_workers_do_not_meet_on_one_interface(link, tmp_path):
    first, _ = holding(link, tmp_path, 4e6)
    second, held_by = holding(link, tmp_path, 2e6)
    assert held_by == ""
    assert "is limited by the worker" in second.communicate()[1]
    first.communicate("")
    assert queue(link)[0] == "tbf"


def test_a_queue_that_cannot_be_put_back_is_left_alone(link, tmp_path):
    replace = ["tc", "qdisc", "replace", "dev", "uplink", "root", "htb"]
    subprocess.run(inside(link.devices[0], replace), check=True)
    process, held_by = holding(link, tmp_path, 4e6)
    assert held_by == ""
    assert "could not be put back" in process.communicate()[1]
    assert queue(link)[0] == "htb"


def test_a_killed_testbed_is_swept_by_the_next_one():
    reason = why_unavailable()
    if reason:
        pytest.skip(reason)
    program = (
        "import subprocess, sys, time\n"
        "from simulations.testbed.network import inside, network\n"
        "with network([1e6]) as made:\n"
        "    left = subprocess.Popen(inside(made.devices[0], ['sleep', '600']))\n"
        "    print(made.server, left.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as killed:
        server, left = killed.stdout.readline().split()
        time.sleep(0.5)
        os.kill(killed.pid, signal.SIGKILL)
    listed = ["ip", "netns", "list"]
    assert server in subprocess.run(listed, capture_output=True, text=True).stdout
    with network([1e6]):
        pass
    assert server not in subprocess.run(listed, capture_output=True, text=True).stdout
    assert not ProcessId(int(left), _stat(int(left))[1] or -1).is_alive()
