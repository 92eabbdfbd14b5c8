"""Hosts in network namespaces, and links of a given rate between them and a server.

Names begin with ``lola-<process number>-``, so that several testbeds do not meet, and
what a killed one has left behind can be told from what another one is using.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

SERVER_ADDRESS = "10.201.0.1"
_NAME = re.compile(r"lola-(\d+)-\w+")
# The queue in front of a link: what waits there is a part of a second.
_BURST_BYTES = 65536
_LATENCY = "200ms"
_STOP_S = 15.0


@dataclass(frozen=True)
class Network:
    """A server and devices that only reach the server.

    Parameters
    ----------
    server
        Namespace of the server; ``d0``, ``d1``, ... in it lead to the devices.
    devices
        Namespace of each device; ``uplink`` in it leads to the server.
    rates_bps
        Rate of each device's uplink, bit/s.
    """

    server: str
    devices: tuple[str, ...]
    rates_bps: tuple[float, ...]


def why_unavailable() -> str | None:
    """Return why there can be no testbed here, in one line; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"{program} is not installed (package iproute2)"
    name = f"lola-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "-n", name, "link", "add", "uplink", "type", "veth")
            _shape(name, "uplink", 1e6)
        finally:
            _run("ip", "netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` fails here: {error.stderr.strip()}"
    return None


@contextmanager
def network(rates_bps: Sequence[float]) -> Iterator[Network]:
    """Set up a server and one device for each rate; take all down in the end.

    All processes in the namespaces are ended with them.

    Parameters
    ----------
    rates_bps
        Rate of each device's uplink, bit/s. What comes down is as fast as it gets.
    """
    sweep()
    prefix = f"lola-{os.getpid()}-"
    devices = tuple(f"{prefix}{index}" for index in range(len(rates_bps)))
    made = Network(f"{prefix}s", devices, tuple(rates_bps))
    try:
        _add_namespace(made.server)
        address = f"{SERVER_ADDRESS}/32"
        _run("ip", "-n", made.server, "addr", "add", address, "dev", "lo")
        for index, (device, rate_bps) in enumerate(
            zip(made.devices, rates_bps, strict=True)
        ):
            _add_namespace(device)
            _connect(made.server, f"d{index}", device, f"10.201.{index + 1}")
            _shape(device, "uplink", rate_bps)
        yield made
    finally:
        _take_down([*made.devices, made.server])


@contextmanager
def cut(made: Network, index: int) -> Iterator[None]:
    """Let nothing pass between a device and the server."""
    # Of the server's end, which keeps the device's routes.
    end = ("ip", "-n", made.server, "link", "set", f"d{index}")
    _run(*end, "down")
    try:
        yield
    finally:
        _run(*end, "up")


@contextmanager
def shaped(made: Network, index: int, rate_bps: float) -> Iterator[None]:
    """Give a device's uplink another rate."""
    _shape(made.devices[index], "uplink", rate_bps)
    try:
        yield
    finally:
        _shape(made.devices[index], "uplink", made.rates_bps[index])


def sweep() -> None:
    """Take down what testbeds left behind that were killed."""
    listed = _run("ip", "netns", "list").split()
    left = [
        name
        for name in listed
        if (match := _NAME.fullmatch(name)) and not _is_running(int(match[1]))
    ]
    _take_down(left)


def inside(namespace: str, command: Sequence[str]) -> list[str]:
    """Return a command that runs another one in a namespace."""
    return ["ip", "netns", "exec", namespace, *command]


def _add_namespace(name: str) -> None:
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "set", "lo", "up")


def _connect(server: str, server_end: str, device: str, subnet: str) -> None:
    _run(
        *("ip", "-n", server, "link", "add", server_end, "type", "veth"),
        *("peer", "name", "uplink", "netns", device),
    )
    _run("ip", "-n", server, "addr", "add", f"{subnet}.1/24", "dev", server_end)
    _run("ip", "-n", device, "addr", "add", f"{subnet}.2/24", "dev", "uplink")
    _run("ip", "-n", server, "link", "set", server_end, "up")
    _run("ip", "-n", device, "link", "set", "uplink", "up")
    _run("ip", "-n", device, "route", "add", "default", "via", f"{subnet}.1")


def _shape(namespace: str, interface: str, rate_bps: float) -> None:
    _run(
        *("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", "tbf"),
        *("rate", f"{int(rate_bps)}bit", "burst", str(_BURST_BYTES)),
        *("latency", _LATENCY),
    )


def _take_down(namespaces: Sequence[str]) -> None:
    """End the processes of some namespaces, and delete them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _STOP_S
        processes = _processes(namespaces)
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        while processes and time.monotonic() < deadline:
            time.sleep(0.1)
            processes = _processes(namespaces)
    for name in namespaces:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _processes(namespaces: Sequence[str]) -> list[int]:
    found = []
    for name in namespaces:
        listed = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        )
        found += [int(number) for number in listed.stdout.split()]
    return found


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
