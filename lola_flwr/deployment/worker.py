"""The resident worker of a device: it keeps what Flower's client processes cannot.

In deployment Flower starts a new client process for every message, and what that
process loaded is gone with it. The worker stays: it holds the app's model, data and
caches from round to round, and the client (``shim.py``) only hands messages over. It
needs no flwr, so that it can run in another Python than the SuperNode.

One worker serves one device and one run at a time. It frees what it holds when the
run's SuperNode is gone, and ends on SIGTERM after the message in hand.
"""

from __future__ import annotations

import errno
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lola_flwr.deployment.app_code import (
    DeviceContext,
    forget_app,
    load_device_function,
    put_on_path,
)
from lola_flwr.deployment.processes import ProcessId
from lola_flwr.deployment.uplink import NoLimit, UplinkLimit
from lola_flwr.deployment.worker_link import (
    Frame,
    LinkError,
    admits,
    at_it,
    connect,
    receive_answer,
    receive_frame,
    send_frame,
    token_path,
    write_token,
)
from lola_flwr.device.contract import OutOfMemory
from lola_flwr.errors import UserError
from lola_flwr.machine.heap import give_back_freed_memory
from lola_flwr.wire.records import Assignment, PartTask

_TICK_S = 0.5
_HELLO_S = 5.0
# A run that has been silent for this long has left the device to another one.
_HOLD_S = 120.0
# A client that takes nothing of its answer for this long has gone.
_SEND_S = 60.0


@dataclass(frozen=True, eq=False)
class _Tenant:
    """The run that the worker serves."""

    run_id: int
    reference: str
    added_to_path: Path | None
    device: Any


class Worker:
    """Serves one device's clients at a Unix socket.

    Parameters
    ----------
    socket_path
        Where to listen; its directory is made, for the owner alone.
    uplink
        Holds the device's upload to its share (default: nothing does).
    hold_s
        A run that sent nothing for this long makes way for another run.
    exit_with_supernode
        Whether to end, and not only to free memory, when the SuperNode is gone.

    Raises
    ------
    UserError
        Another worker answers at this socket.
    """

    def __init__(
        self,
        socket_path: Path,
        *,
        uplink: UplinkLimit | None = None,
        hold_s: float = _HOLD_S,
        exit_with_supernode: bool = False,
    ) -> None:
        self._path = socket_path
        self._uplink = NoLimit() if uplink is None else uplink
        self._hold_s = hold_s
        self._exit_with_supernode = exit_with_supernode
        self._token = secrets.token_hex(32)
        # Whoever trains or changes the tenant holds it.
        self._busy = threading.Lock()
        self._tenant: _Tenant | None = None
        # Whose message came last, even if the app failed at it.
        self._supernode: ProcessId | None = None
        self._last_message = 0.0
        self._messages = 0
        # Threads with a message whose answer is not sent yet.
        self._in_hand: set[threading.Thread] = set()
        self._stopping = threading.Event()
        try:
            self._socket = _listen(socket_path)
            self._bound = _identity(socket_path)
        except OSError as error:
            raise UserError(
                f"--socket {socket_path}: {error}; name a file in a directory that is "
                "this user's."
            ) from None
        write_token(socket_path, self._token)

    def serve(self) -> None:
        """Serve until ``stop`` is called; then let the message in hand be answered."""
        self._socket.settimeout(_TICK_S)
        callers = selectors.DefaultSelector()
        callers.register(self._socket, selectors.EVENT_READ)
        next_look = 0.0
        try:
            while not self._stopping.is_set():
                if time.monotonic() >= next_look:
                    self._watch_supernode()
                    next_look = time.monotonic() + _TICK_S
                try:
                    # Not by accept's own timeout: on a socket that is shut down it
                    # tries again and again until the time is over.
                    if not callers.select(_TICK_S) or self._stopping.is_set():
                        continue
                    connection, _ = self._socket.accept()
                except TimeoutError:
                    continue
                except OSError:
                    if self._stopping.is_set():
                        break
                    raise
                threading.Thread(
                    target=self._answer, args=(connection,), daemon=True
                ).start()
        finally:
            callers.close()
            self._socket.close()
            # A successor may have bound the path anew.
            if _identity(self._path) == self._bound:
                for path in (self._path, token_path(self._path)):
                    path.unlink(missing_ok=True)
            for thread in tuple(self._in_hand):
                thread.join()
            try:
                with self._busy:
                    self._release()
            finally:
                self._uplink.close()

    def stop(self) -> None:
        """Ask ``serve`` to end."""
        self._stopping.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes it up

    # --- one connection --------------------------------------------------------------

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(_HELLO_S)
                if not admits(connection, self._token):
                    return
                connection.settimeout(None)
                asked = receive_frame(connection)
            except (LinkError, TimeoutError):
                return  # who leaves now only looked whether a worker is there
            self._in_hand.add(threading.current_thread())
            try:
                with at_it(connection):
                    answer = self._reply_or_error(asked)
                connection.settimeout(_SEND_S)
                send_frame(connection, answer)
            except LinkError as error:
                _say(f"a client did not wait for its answer: {error}")
            finally:
                self._in_hand.discard(threading.current_thread())

    def _reply_or_error(self, asked: Frame) -> Frame:
        try:
            return self._reply(asked)
        except UserError as error:
            return Frame("error", {"user": True, "message": str(error)})
        except OutOfMemory as error:
            return Frame("out-of-memory", {"message": str(error)})
        # What an app raises is the app's; the worker goes on with the next message.
        except Exception as error:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
            return Frame("error", {"user": False, "message": message})

    def _reply(self, asked: Frame) -> Frame:
        if asked.kind == "status":
            return Frame("status", self._status())
        if asked.kind == "stop":
            self.stop()
            return Frame("status", self._status())
        if asked.kind not in ("profile", "train", "part"):
            raise UserError(f"A worker does not know the message {asked.kind!r}.")
        context = DeviceContext(**asked.header["context"])
        self._refuse_second_run(context.run_id, training=self._busy.locked())
        # A client that was killed leaves its message to be finished; the next one of
        # the same run waits here.
        with self._busy:
            if self._stopping.is_set():
                raise UserError("The worker is stopping.")
            self._refuse_second_run(context.run_id, training=False)
            self._supernode = ProcessId.from_header(asked.header["supernode"])
            device = self._device_for(context, asked.header)
            self._last_message = time.monotonic()
            if asked.kind == "profile":
                return Frame("profile", {"properties": device.profile.to_properties()})
            compute = self._train if asked.kind == "train" else _compute_part
            answer = compute(device, asked)
            self._messages += 1
            self._last_message = time.monotonic()
            return answer

    def _train(self, device: Any, asked: Frame) -> Frame:
        assignment = Assignment.from_record(asked.header["assignment"])
        update = device.train(assignment, asked.arrays)
        report = update.report.to_record()
        limit = self._uplink.hold_to(
            assignment.uplink_bps,
            sum(a.nbytes for a in update.arrays.values())
            + len(update.report.projections or b""),
        )
        if limit is not None:
            report["uplink-limit"] = limit
        header = {"num_examples": update.num_examples, "report": report}
        return Frame("update", header, update.arrays)

    # --- the run that is served ------------------------------------------------------

    def _refuse_second_run(self, run_id: int, *, training: bool) -> None:
        tenant = self._tenant
        if tenant is None or tenant.run_id == run_id:
            return
        silent_s = time.monotonic() - self._last_message
        if training or silent_s < self._hold_s:
            raise UserError(
                f"This device's worker serves run {tenant.run_id}; run {run_id} can "
                f"have it once that run has been silent for {self._hold_s:g} s."
            )

    def _device_for(self, context: DeviceContext, header: Mapping[str, Any]) -> Any:
        """Return the run's device; make it, and forget another run's, if need be."""
        reference, root = header["reference"], Path(header["root"])
        tenant = self._tenant
        if tenant is not None:
            if tenant.run_id == context.run_id:
                return tenant.device
            self._release()
        added_to_path = root if put_on_path(root) else None
        try:
            device = load_device_function(reference)(context)
        except BaseException:
            # Or the next run, whose app may be mended, would get these modules.
            forget_app(reference, added_to_path)
            raise
        self._tenant = _Tenant(context.run_id, reference, added_to_path, device)
        _say(f"serving run {context.run_id} with {reference} in {root}")
        return device

    def _watch_supernode(self) -> None:
        supernode = self._supernode
        if supernode is None or supernode.is_alive():
            return
        if not self._busy.acquire(blocking=False):
            return
        try:
            if self._supernode != supernode:
                return  # a new one sent a message meanwhile
            self._supernode = None
            _say("the SuperNode is gone: memory is freed")
            self._release()
        finally:
            self._busy.release()
        if self._exit_with_supernode:
            self.stop()

    def _release(self) -> None:
        """Free what the present run holds, and lift the limit of its last round."""
        if self._tenant is None:
            return
        tenant, self._tenant = self._tenant, None
        forget_app(tenant.reference, tenant.added_to_path)
        try:
            self._uplink.hold_to(None, 0)
        except UserError as error:
            _say(f"the limit of the last round stays: {error}")
        give_back_freed_memory()

    def _status(self) -> dict[str, Any]:
        tenant = self._tenant
        return {
            "pid": os.getpid(),
            "run_id": None if tenant is None else tenant.run_id,
            "messages": self._messages,
            "training": self._busy.locked(),
            "uplink": self._uplink.describe(),
            **self._uplink.counters(),
        }


def ask_worker(socket_path: Path, kind: str) -> dict[str, Any]:
    """Ask the worker at a socket for its status, or to stop.

    Raises
    ------
    LinkError
        No worker answers there.
    """
    with connect(socket_path) as connection:
        send_frame(connection, Frame(kind))
        return dict(receive_answer(connection).header)


def run_worker(worker: Worker) -> None:
    """Serve until SIGTERM or Ctrl-C."""

    def stop(*_: object) -> None:
        worker.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    worker.serve()


def _compute_part(device: Any, asked: Frame) -> Frame:
    task = PartTask.from_record(asked.header["task"])
    report, arrays = device.compute_part(task, asked.arrays)
    return Frame("part", {"report": report.to_record()}, arrays)


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with probe:
        probe.setblocking(False)
        # A worker with a full queue is there, too.
        if probe.connect_ex(str(path)) in (0, errno.EAGAIN):
            listening.close()
            raise UserError(
                f"Another worker answers at {path}; a device has one. Stop that one "
                f"first: lola-flwr worker --socket {path} --stop."
            )
    # What a killed worker left behind.
    path.unlink(missing_ok=True)
    # Nobody else may connect in the moment between bind and chmod.
    umask = os.umask(0o177)
    try:
        listening.bind(str(path))
    finally:
        os.umask(umask)
    listening.listen(16)
    return listening


def _identity(path: Path) -> tuple[int, int] | None:
    """Tell a file from another of its name; None if there is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _say(text: str) -> None:
    print(f"lola-flwr worker: {text}", file=sys.stderr, flush=True)
