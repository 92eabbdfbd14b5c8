"""The processes in which devices compute, as the server's process sees them."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from logging import ERROR
from threading import Lock
from typing import Any

from flwr.app import Context, Message
from flwr.common.logger import log
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.errors import UserError
from lola_flwr.simulation import device_process
from lola_flwr.simulation.flower_app import FlowerApp
from lola_flwr.simulation.link import ASK, LOG, START, Inbox, Link, Outbox, Parts
from lola_flwr.simulation.watch import how_it_ended

# How often a process is looked at that computes and says nothing, or that starts, and
# how long one may take to end.
_LOOK_S, _MOMENT_S, _END_S = 0.5, 0.05, 3.0


class DeviceProcess:
    """One of them.

    Parameters
    ----------
    process
        The process.
    link
        Leads to it.
    """

    def __init__(self, process: subprocess.Popen[bytes], link: Link) -> None:
        self.turn = Lock()
        self._process = process
        self._link = link
        self._outbox = Outbox()
        self._ready = False
        self._is_over = False
        self._poll = select.poll()
        self._poll.register(link.connection, select.POLLIN)

    def answer(
        self, message: Message, context: Context
    ) -> tuple[Message, Context | None]:
        """Have a device compute; return as `answering.answer` does.

        Raises
        ------
        UserError
            The process has ended.
        """
        with self._named():
            self._link.send(ASK, *self._outbox.parts(message, context))
            while True:
                said = self._said(_LOOK_S)
                if said is not None:
                    return Inbox().message(said)

    def is_ready(self) -> bool:
        """Tell, after a moment at most, whether it has loaded what it needs.

        Raises
        ------
        UserError
            The process has ended.
        """
        with self._named():
            if not self._ready:
                self._ready = self._said(_MOMENT_S) is not None
        return self._ready

    def expect_end(self) -> None:
        """Have its end be no news from now on."""
        self._is_over = True

    def forget(self) -> None:
        """Hold no longer what was sent last."""
        self._outbox.forget()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say how the process has ended, if that is what goes wrong."""
        try:
            yield
        except (EOFError, OSError):
            self._process.kill()
            ended = how_it_ended(self._process.wait())
            said = (
                f"A process of devices ({self._process.pid}) {ended}; start again "
                "with the same output directory to go on from its last checkpoint."
            )
            # This process may be computing, and says it itself only after that.
            if not self._is_over:
                log(ERROR, "%s", said)
            raise UserError(said) from None

    def _said(self, wait_s: float) -> Parts | None:
        """Return what the process says, if it does in time and it is not for the log.

        Raises
        ------
        EOFError
            It has ended: what it has started may still hold its end of the link.
        """
        if not self._poll.poll(1000 * wait_s):
            if self._process.poll() is not None:
                raise EOFError
            return None
        kind, parts = self._link.receive()
        if kind != LOG:
            return parts
        level, said = parts
        log(int(level), "%s", said.decode())
        return None


@contextmanager
def device_processes(
    number: int, app: FlowerApp, config: Mapping[str, Any], threads: int | None
) -> Iterator[Sequence[DeviceProcess]]:
    """Start processes in which devices of an app compute, and end them at last.

    Parameters
    ----------
    number
        How many.
    app
        The app.
    config
        Its run configuration.
    threads
        PyTorch's threads in each; None: as many as a process has.
    """
    told = {
        "directory": str(app.directory.resolve()),
        "clientapp": app.components["clientapp"],
        "prepare": app.prepare,
        "config": dict(config),
        "identity": [TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id],
    }
    with ExitStack() as stack:
        started = [stack.enter_context(_started(threads)) for _ in range(number)]
        for _, link in started:
            # One that has ended already is named when it is asked for something.
            with suppress(OSError):
                link.send(START, json.dumps(told).encode())
        processes = [DeviceProcess(process, link) for process, link in started]
        try:
            yield processes
        finally:
            for process in processes:
                process.expect_end()


@contextmanager
def _started(
    threads: int | None,
) -> Iterator[tuple[subprocess.Popen[bytes], Link]]:
    own, other = socket.socketpair()
    given = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with own, other:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", device_process.__name__, str(other.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            env={**os.environ, **given},
            # What a terminal sends to a group of processes is not for this one.
            start_new_session=True,
        )
        other.close()
        try:
            yield process, Link(own)
        finally:
            # It would end with its link, but not before it has started.
            own.close()
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def num_places(num_devices: int, cpus_per_device: int) -> int:
    """Return how many devices compute at a time: as many as there are CPUs for.

    One where processes cannot be handed a socket.
    """
    if os.name != "posix":
        return 1
    cpus = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    return max(1, min(num_devices, cpus // cpus_per_device))
