"""The thin client: hands Flower's messages to the device's resident worker.

An app names its device function instead of importing it, and nothing of the app but
this is loaded per message::

    from lola_flwr.clients import LoLaClient
    from lola_flwr.deployment.shim import resident

    app = LoLaClient(resident("my_app.device:device_fn"))

A SuperNode whose configuration names a worker, ``--node-config
'worker="/run/lola-flwr/worker.sock"'``, has one; where none runs, the first message
starts it. Without that key, as in a simulation, or if the worker cannot be reached, the
function runs in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy.typing as npt
from flwr.app import Context
from flwr.common.logger import log

from lola_flwr.deployment.app_code import app_root, load_device_function
from lola_flwr.deployment.processes import supernode
from lola_flwr.deployment.worker_link import (
    Frame,
    LinkError,
    Silent,
    ask,
    connect,
    token_path,
)
from lola_flwr.device.contract import Device, LocalUpdate, OutOfMemory
from lola_flwr.errors import UserError
from lola_flwr.machine.files import expanded, local_path
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.records import Assignment, PartReport, PartTask, UpdateReport

_START_S = 20.0
# A worker that was killed leaves its token behind, and is started again: RestartSec of
# clients/linux/lola-worker.service, and the start itself.
_SUCCESSOR_S = 10.0


class WorkerFailed(RuntimeError):
    """The app raised an error in the worker, whose log has the traceback."""


def resident(reference: str) -> Callable[[Context], Device]:
    """Return a device function that lets the worker run the app's one.

    Parameters
    ----------
    reference
        The app's device function, as ``"package.module:function"``. Its argument has
        ``run_id``, ``node_id``, ``node_config`` and ``run_config``, as Flower's
        Context has them, and it returns a ``BlockDevice``.
    """

    def device_fn(context: Context) -> Device:
        path = context.node_config.get("worker")
        if path:
            try:
                return WorkerDevice(reference, context, _running_worker(context))
            except LinkError as error:
                log(
                    WARNING,
                    "no worker: %s This client trains by itself, with its share of "
                    "the uplink as advice.",
                    error,
                )
        device: Device = load_device_function(reference)(context)
        return device

    return device_fn


class WorkerDevice:
    """The device as its worker runs it.

    Parameters
    ----------
    reference
        The app's device function.
    context
        Context of the message.
    socket_path
        Where the worker listens.
    """

    def __init__(self, reference: str, context: Context, socket_path: Path) -> None:
        owner = supernode()
        self._socket_path = socket_path
        self._header = {
            "reference": reference,
            "root": str(app_root(reference)),
            "supernode": None if owner is None else owner.to_header(),
            "context": {
                "run_id": context.run_id,
                "node_id": context.node_id,
                "node_config": dict(context.node_config),
                "run_config": dict(context.run_config),
            },
        }

    @property
    def profile(self) -> DeviceProfile:
        """What the device offers."""
        return DeviceProfile.from_properties(self._ask("profile").header["properties"])

    def train(
        self,
        assignment: Assignment,
        values: Mapping[str, npt.NDArray[Any]],
    ) -> LocalUpdate:
        """Compute the mean gradient of the assigned block on one mini-batch.

        Raises
        ------
        UserError
            What the worker or the app calls a user's mistake.
        WorkerFailed
            The app failed in the worker, or the worker did.
        """
        answer = self._ask("train", {"assignment": assignment.to_record()}, values)
        return LocalUpdate(
            dict(answer.arrays),
            int(answer.header["num_examples"]),
            UpdateReport.from_record(answer.header["report"]),
        )

    def compute_part(
        self, task: PartTask, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[PartReport, dict[str, npt.NDArray[Any]]]:
        """Do a part of a step, where the model is spread over devices.

        Raises
        ------
        UserError
            What the worker or the app calls a user's mistake.
        WorkerFailed
            The app failed in the worker, or the worker did.
        """
        answer = self._ask("part", {"task": task.to_record()}, arrays)
        return PartReport.from_record(answer.header["report"]), dict(answer.arrays)

    def _ask(
        self,
        kind: str,
        header: Mapping[str, Any] | None = None,
        arrays: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> Frame:
        asked = Frame(kind, {**self._header, **(header or {})}, arrays or {})
        try:
            answer = ask(self._socket_path, asked)
        except Silent as error:
            raise WorkerFailed(f"The worker hangs and was ended: {error}") from None
        except LinkError as error:
            # Training anew in this process would take the memory a second time.
            raise WorkerFailed(
                f"The worker ended in the middle of it, or is of another release of "
                f"lola-flwr (end its process then): {error}"
            ) from None
        if answer.kind == "out-of-memory":
            raise OutOfMemory(answer.header["message"])
        if answer.kind == "error":
            kind_of_error = UserError if answer.header["user"] else WorkerFailed
            raise kind_of_error(answer.header["message"])
        return answer


def _running_worker(context: Context) -> Path:
    """Return where the node's worker listens; start it if it does not.

    Raises
    ------
    LinkError
        It cannot be started.
    """
    path = local_path(str(context.node_config["worker"]))
    if _answers(path, within_s=_SUCCESSOR_S if token_path(path).exists() else 0.0):
        return path
    # Its own session: it outlives this process, and ends when the SuperNode does.
    process = subprocess.Popen(
        [
            expanded(str(context.node_config.get("worker-python", sys.executable))),
            *("-m", "lola_flwr.deployment.serve_worker"),
            *("--socket", str(path), "--exit-with-supernode"),
        ],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd="/",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    if _answers(path, within_s=_START_S, of=process):
        return path
    raise LinkError(
        f"none runs at {path}, and starting one failed "
        f"(exit code {process.poll()}; its reason is in the SuperNode's log)."
    )


def _answers(
    path: Path, *, within_s: float, of: subprocess.Popen[bytes] | None = None
) -> bool:
    """Tell whether a worker answers in time, if the process that is to be it runs."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            connect(path).close()
            return True
        except LinkError:
            if time.monotonic() >= deadline or (
                of is not None and of.poll() is not None
            ):
                return False
            time.sleep(0.05)
