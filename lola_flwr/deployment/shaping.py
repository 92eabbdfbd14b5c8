"""Hold an upload to a rate with the kernel's traffic control (Linux, NET_ADMIN).

Where a worker may configure the interface, the kernel limits what goes to the SuperLink
and nothing else. An HTB queue with one limited class takes the place of the interface's
root queue; ``TrafficControl`` puts back what it found when the worker ends. What it
found is on disk before anything is changed, so that the next start puts it back after a
``kill -9``, too.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lola_flwr.deployment.processes import ProcessId, this_process
from lola_flwr.errors import UserError
from lola_flwr.machine.files import replacing

_STATE_DIRECTORY = Path(os.environ.get("LOLA_STATE_DIR", "/run/lola-flwr"))
# By this handle the queue is known to be ours.
_HANDLE = "4c4f:"
# Of queues that the kernel puts there by itself, and puts back when ours is deleted;
# the same kind of queue from a person's hand has another handle.
_KERNELS_HANDLE = "0:"


class TrafficControl:
    """Limits what an interface sends to the SuperLink.

    Parameters
    ----------
    interface
        Name of the interface.
    superlink
        Address of the SuperLink, ``host:port``.
    state_directory
        Where what was found is noted.

    Raises
    ------
    UserError
        There is no tc, no right to use it, or a queue that could not be put back.
    """

    def __init__(
        self,
        interface: str,
        superlink: str,
        *,
        state_directory: Path = _STATE_DIRECTORY,
    ) -> None:
        host, _, port = superlink.rpartition(":")
        if not (host and port.isdigit()):
            raise UserError(f"{superlink!r} is no address; write host:port.")
        self._interface = interface
        self._destination = (_ipv4(host), port)
        self._state = _state_path(interface, state_directory)
        self._directory = state_directory
        self._limit_bps: float | None = None
        restore(interface, state_directory=state_directory)
        found = _root_queue(interface)
        _put_back_arguments(interface, found)  # refuses what it cannot put back
        _write(self._state, {"owner": this_process().to_header(), "found": found})
        _tc("qdisc", "replace", *_root(interface), *("handle", _HANDLE, "htb"))

    def hold_to(self, limit_bps: float | None, upload_bytes: int) -> str | None:
        """Limit what goes to the SuperLink from now on."""
        interface, parent = self._interface, ("dev", self._interface, "parent", _HANDLE)
        host, port = self._destination
        if self._limit_bps is not None:
            _tc("filter", "del", *parent)
            self._limit_bps = None
        if limit_bps is None:
            return None
        rate = f"{max(int(limit_bps), 1000)}bit"
        class_id = f"{_HANDLE}1"
        # A burst of 20 ms, at least two full packets.
        burst = str(max(int(limit_bps / 8 * 0.02), 3200))
        _tc(
            *("class", "replace", "dev", interface, "parent", _HANDLE),
            *("classid", class_id, "htb", "rate", rate, "ceil", rate),
            *("burst", burst, "cburst", burst),
        )
        _tc(
            *("filter", "add", *parent, "protocol", "ip", "prio", "1", "u32"),
            *("match", "ip", "dst", f"{host}/32"),
            *("match", "ip", "dport", port, "0xffff", "flowid", class_id),
        )
        self._limit_bps = limit_bps
        return "tc"

    def describe(self) -> str:
        """Return one line for a person."""
        limit = self._limit_bps
        now = "no limit now" if limit is None else f"{limit / 1e6:.3f} Mbit/s now"
        return f"tc on {self._interface}, {now}"

    def counters(self) -> dict[str, int]:
        """Return nothing: the interface carries other traffic, too."""
        return {}

    def close(self) -> None:
        """Put back what was found."""
        restore(self._interface, state_directory=self._directory)


def restore(interface: str, *, state_directory: Path = _STATE_DIRECTORY) -> bool:
    """Put back the queue that a worker found on an interface; tell whether it had to.

    Raises
    ------
    UserError
        There is no tc, no right to use it, or another worker limits the interface.
    """
    path = _state_path(interface, state_directory)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    owner = ProcessId(*state["owner"])
    if owner != this_process() and owner.is_alive():
        raise UserError(
            f"{interface} is limited by the worker with the process number "
            f"{owner.pid}; stop that one first."
        )
    ours = _root_queue(interface).get("handle") == _HANDLE
    if ours:
        # What the kernel puts there by itself comes back with the deletion.
        _tc("qdisc", "del", *_root(interface))
        arguments = _put_back_arguments(interface, state["found"])
        if arguments:
            _tc("qdisc", "replace", *_root(interface), *arguments)
    path.unlink()
    return ours


def _put_back_arguments(interface: str, found: Mapping[str, Any]) -> list[str]:
    """Return the arguments of tc that make a queue again; none for the kernel's own.

    Raises
    ------
    UserError
        This queue could not be put back as it was.
    """
    if found.get("handle", _KERNELS_HANDLE) == _KERNELS_HANDLE:
        return []
    kind = found["kind"]
    if kind == "tbf":
        options = found["options"]
        # tc writes bytes per second and microseconds; it rounds the burst down.
        return [
            *("tbf", "rate", f"{options['rate'] * 8}bit"),
            *("burst", f"{options['burst'] + 1}b"),
            *("latency", f"{max(int(options['lat']), 1)}us"),
        ]
    raise UserError(
        f"{interface} has a root queue of kind {kind!r}, which could not be put back "
        "as it was; use --relay, which changes no interface."
    )


def _root_queue(interface: str) -> dict[str, Any]:
    listed = json.loads(_tc("-j", "qdisc", "show", "dev", interface) or "[]")
    for queue in listed:
        if queue.get("root"):
            return dict(queue)
    return {}


def _root(interface: str) -> tuple[str, ...]:
    return ("dev", interface, "root")


def _tc(*arguments: str) -> str:
    program = shutil.which("tc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise UserError("tc is not installed (package iproute2); use --relay instead.")
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(
            f"tc {' '.join(arguments)}: {reason}. It needs NET_ADMIN and the kernel's "
            "htb and u32; --relay needs neither."
        )
    return done.stdout


def _ipv4(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        raise UserError(f"{host!r} has no IPv4 address ({error.strerror}).") from None


def _state_path(interface: str, directory: Path) -> Path:
    return directory / f"shaping-{interface}.json"


def _write(path: Path, values: Mapping[str, Any]) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(values), encoding="utf-8")
