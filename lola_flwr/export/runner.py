"""Run exported programs: one interface, and the native program behind it.

The other backend, ExecuTorch's Python bindings, is in `lola_flwr.export.bindings`,
since those need PyTorch.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy.typing as npt

from lola_flwr.deployment.worker_link import (
    Frame,
    LinkError,
    receive_frame,
    send_frame,
)
from lola_flwr.device.contract import OutOfMemory
from lola_flwr.errors import UserError
from lola_flwr.export.manifest import ExportManifest

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self

_ENDS_S = 5.0


class Runner(Protocol):
    """Runs the programs of a directory."""

    @property
    def peak_memory_bytes(self) -> float | None:
        """Peak of the memory that programs have taken so far; None if not known."""

    def run(
        self, block: int, inputs: Sequence[npt.NDArray[Any]]
    ) -> list[npt.NDArray[Any]]:
        """Run a block's program.

        Parameters
        ----------
        block
            The block.
        inputs
            What the manifest lists as inputs, in order.

        Returns
        -------
        The loss and the gradients, in the order of the manifest.

        Raises
        ------
        UserError
            There is no such program, or it cannot be run.
        OutOfMemory
            The memory does not suffice.
        """


class NativeRunner:
    """Runs the programs of a directory in a process of ``lola-runner``.

    It is started at the first run, and ends with this one, or when it is closed; one
    that died is started anew.

    Parameters
    ----------
    program
        The runner, as CMake builds it from ``clients/native``.
    directory
        The directory.
    manifest
        Its manifest.
    """

    def __init__(
        self, program: Path, directory: Path, manifest: ExportManifest
    ) -> None:
        self._program = program
        self._directory = directory
        self._manifest = manifest
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._peak_memory_bytes: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def peak_memory_bytes(self) -> float | None:
        """Peak of the runner's memory, since it was started."""
        return self._peak_memory_bytes

    def run(
        self, block: int, inputs: Sequence[npt.NDArray[Any]]
    ) -> list[npt.NDArray[Any]]:
        """Run a block's program, as `Runner` says."""
        self._manifest.program(block)
        names = [spec.name for spec in self._manifest.inputs]
        asked = Frame("run", {"block": block}, dict(zip(names, inputs, strict=True)))
        try:
            connection = self._connected()
            send_frame(connection, asked)
            answer = receive_frame(connection)
        except LinkError as error:
            self.close()
            raise UserError(
                f"{self._program} ended in the middle of a step ({error}); what it "
                "said is in this process's standard error."
            ) from error
        if answer.kind != "outputs":
            self._refuse(answer)
        self._peak_memory_bytes = float(answer.header["peak_memory_bytes"])
        return list(answer.arrays.values())

    def close(self) -> None:
        """End the runner."""
        connection, process = self._connection, self._process
        self._connection = self._process = None
        if connection is not None:
            connection.close()
        if process is not None:
            try:
                process.wait(_ENDS_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _connected(self) -> socket.socket:
        if self._connection is not None:
            return self._connection
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [str(self._program), str(self._directory)],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                )
        except OSError as error:
            ours.close()
            raise UserError(
                f"{self._program} cannot be started ({error.strerror}); build it from "
                "clients/native."
            ) from None
        self._connection = ours
        ready = receive_frame(ours)
        if ready.kind != "ready":
            self._refuse(ready)
        return ours

    def _refuse(self, answer: Frame) -> NoReturn:
        """Raise what the runner says in place of what it was asked for."""
        said = str(answer.header.get("message", answer.kind))
        # It has ended, or gives back what it has.
        self.close()
        raise OutOfMemory(said) if answer.kind == "out-of-memory" else UserError(said)
