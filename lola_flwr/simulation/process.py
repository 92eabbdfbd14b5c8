"""Run a Flower app's server and devices in this process, and in others beside it."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from logging import ERROR, INFO
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import FLOWER_LOGGER, log
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.errors import UserError
from lola_flwr.machine.files import filling
from lola_flwr.machine.heap import nothing_collected
from lola_flwr.simulation.device_processes import (
    DeviceProcess,
    device_processes,
    num_places,
)
from lola_flwr.simulation.finished import FinishedRun
from lola_flwr.simulation.flower_app import FlowerApp, named
from lola_flwr.simulation.grid import ProcessGrid
from lola_flwr.simulation.programs import environment

# What Flower calls the server among the nodes of a run.
_SERVER_NODE_ID = 1

_Component = TypeVar("_Component", ServerApp, ClientApp)


@contextmanager
def own_processes(
    app: FlowerApp,
    *,
    num_devices: int,
    config: Mapping[str, Any],
    home: Path,
    cpus_per_device: int = 1,
) -> Iterator[Callable[[Callable[[str], object] | None], FinishedRun]]:
    """Start the processes in which an app's devices compute, beside this one.

    As many devices compute at a time as there are CPUs for, one of them in this
    process; neither a SuperLink nor Ray is started. Records of this package's apps are
    those of Flower's engine.

    Parameters
    ----------
    app
        The app.
    num_devices
        Simulated devices.
    config
        The app's run configuration, complete.
    home
        FLWR_HOME of this process from now on.
    cpus_per_device
        CPUs that a device takes, and PyTorch's threads while it computes, unless
        OMP_NUM_THREADS says how many any process has.

    Yields
    ------
    What runs the app's ServerApp, and its ClientApp for each message that it sends. It
    is told what to call with each line that Flower's logger says.

    Raises
    ------
    UserError
        The app has no ServerApp, or no ClientApp; ``home`` can be no directory.
    """
    for key in ("serverapp", "clientapp"):
        if key not in app.components:
            raise UserError(f"{app.name} names no {key} in [tool.flwr.app.components].")
    with filling(home), tempfile.TemporaryFile(dir=home):
        # Devices keep something there, each in a process of its own.
        os.environ.update(environment(home.absolute()))
    sys.path.insert(0, str(app.directory.resolve()))
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = secrets.randbits(63)
    TaskIdentity.node_id = _SERVER_NODE_ID
    # As Ray does with the processes of its devices.
    threads = None if "OMP_NUM_THREADS" in os.environ else cpus_per_device
    places = num_places(num_devices, cpus_per_device)
    if places > 1:
        # PyTorch's threads would wait by spinning, on cores that the others need. It
        # is read when PyTorch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with device_processes(places - 1, app, config, threads) as processes:
        yield partial(_run, app, num_devices, config, threads, processes)


def _run(
    app: FlowerApp,
    num_devices: int,
    config: Mapping[str, Any],
    threads: int | None,
    processes: Sequence[DeviceProcess],
    echo: Callable[[str], object] | None,
) -> FinishedRun:
    client_app = _component(app, "clientapp", ClientApp)
    server_app = _component(app, "serverapp", ServerApp)
    # The other processes leave out what they cannot find.
    named(app, "prepare", app.prepare)
    first = _SERVER_NODE_ID + 1
    nodes = range(first, first + num_devices)
    run_id = TaskIdentity.run_id
    grid = ProcessGrid(
        dict.fromkeys(nodes, client_app),
        {
            node: {"partition-id": node - first, "num-partitions": num_devices}
            for node in nodes
        },
        Run.create_empty(run_id=run_id),
        config,
        threads,
        processes,
    )
    context = Context(
        run_id=run_id,
        node_id=_SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(config),
    )
    count = f"{1 + len(processes)} processes" if processes else "one process"
    with _logged(echo) as lines:
        log(INFO, "%s devices in %s (--engine process)", num_devices, count)
        status, cause = _status(server_app, grid, context)
    return FinishedRun(status, "".join(lines), cause)


def _status(
    server_app: ServerApp, grid: Grid, context: Context
) -> tuple[str, str | None]:
    """Run the server; return how that ended, in the words of Flower's engine, and why.

    A user's mistake is one line; the rest has a traceback.
    """
    try:
        server_app(grid, context)
    except UserError as error:
        return "finished:failed", str(error)
    # Whatever an app raises ends its run.
    except Exception as error:
        log(ERROR, "Simulation raised an exception", exc_info=error)
        return "finished:failed", None
    return "finished:completed", None


def _component(app: FlowerApp, key: str, kind: type[_Component]) -> _Component:
    """Import what an app names in ``[tool.flwr.app.components]``."""
    name = app.components[key]
    with nothing_collected():
        component = resolve_name(name)
    if not isinstance(component, kind):
        raise UserError(f"{key} = {name!r} of {app.name} is no {kind.__name__}.")
    return component


class _Lines(logging.Handler):
    """Keeps what is logged, and hands it on line by line."""

    def __init__(self, echo: Callable[[str], object] | None) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._echo = echo
        self.setFormatter(logging.Formatter("%(levelname)s :      %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self.lines.append(f"{line}\n")
            if self._echo is not None:
                self._echo(f"{line}\n")


@contextmanager
def _logged(echo: Callable[[str], object] | None) -> Iterator[list[str]]:
    """Give the lines that Flower's logger says, which go nowhere else."""
    handler, before = _Lines(echo), FLOWER_LOGGER.handlers
    FLOWER_LOGGER.handlers = [handler]
    try:
        yield handler.lines
    finally:
        FLOWER_LOGGER.handlers = before
