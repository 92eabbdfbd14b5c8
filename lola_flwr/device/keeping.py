"""What a device keeps of a model that is spread over devices, between messages.

The values that it holds, stepped by itself; the gradient of a step until the server
says whether it counts; and what it was sent on the way forward, for the way back. All
of it is in memory, and on the disk where the device has a store: the next message may
come to another process. What autograd recorded is in memory alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lola_flwr.errors import UserError
from lola_flwr.machine.files import replacing
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.run.checkpoint import CheckpointDamaged, Snapshot, read, write
from lola_flwr.wire.records import MalformedRecord, PartTask

Arrays = Mapping[str, npt.NDArray[Any]]


class Lacks(Exception):
    """The device does not have what a task builds on: ``"values"`` or ``"inputs"``."""


@dataclass(frozen=True)
class Keeping:
    """Where a device keeps what is its own from one message to the next.

    Parameters
    ----------
    device
        Its name; those of one process may share a model and a store.
    store
        Directory of the run; None: in memory alone.
    memory_bytes
        Memory that it offers.
    """

    device: str = ""
    store: Path | None = None
    memory_bytes: float = float("inf")


@dataclass(frozen=True, eq=False)
class Recorded:
    """What autograd recorded of a branch on the way forward.

    Parameters
    ----------
    step
        The step.
    versions
        Versions of the parameters that it was recorded with.
    passes
        Input and output of each micro-batch, by number.
    nbytes
        What it takes.
    """

    step: int
    versions: tuple[int, ...]
    passes: Mapping[int, tuple[Tensor, Tensor]]
    nbytes: int


@dataclass(eq=False)
class _Memory:
    """What a process knows of the devices that share a model."""

    trainer_id: int = 0
    kept: dict[str, Snapshot] = field(default_factory=dict)
    recorded: dict[str, Recorded] = field(default_factory=dict)


_memories: WeakKeyDictionary[nn.Module, _Memory] = WeakKeyDictionary()


class Shelf:
    """What a device keeps of one branch's groups.

    Parameters
    ----------
    keeping
        Where.
    model
        The device's model; what is in memory is gone with it.
    task
        A task about them.
    """

    def __init__(self, keeping: Keeping, model: nn.Module, task: PartTask) -> None:
        memory = _memories.setdefault(model, _Memory())
        if memory.trainer_id != task.trainer_id:
            # What another run left.
            memory = _memories[model] = _Memory(task.trainer_id)
        self._memory, self._store = memory, keeping.store
        # A name may hold what a path must not.
        self._device = hashlib.sha256(keeping.device.encode()).hexdigest()[:16]
        self._branch = (
            f"{self._device}-{task.trainer_id}-{task.layer_index}-{task.branch_index}-"
        )
        self._place = f"{self._branch}{task.first_group}-{task.last_group}"

    def get(self, kind: str, fits: Callable[[Snapshot], bool]) -> Snapshot | None:
        """Return what was kept, in memory or on the disk, if it is what is looked for.

        Parameters
        ----------
        kind
            What it is.
        fits
            Whether it is that. What is in memory may be of another day: the messages
            in between went to other processes.
        """
        name = self._name(kind)
        known = self._memory.kept.get(name)
        if known is not None and fits(known):
            return known
        if self._store is None:
            return None
        try:
            found = read(self._store / name)
        except CheckpointDamaged:  # nor is it there
            return None
        if not fits(found):
            return None
        self._memory.kept[name] = found
        return found

    def put(self, kind: str, snapshot: Snapshot) -> None:
        """Keep something in place of what was kept under its kind before."""
        name = self._name(kind)
        self._memory.kept[name] = snapshot
        if self._store is not None:
            with replacing(self._store / name, shared=True) as unfinished:
                write(unfinished, snapshot)

    def drop(self, kind: str) -> None:
        """Forget something."""
        name = self._name(kind)
        self._memory.kept.pop(name, None)
        if self._store is not None:
            (self._store / name).unlink(missing_ok=True)

    def drop_others(self) -> None:
        """Forget what the device kept of other groups of the branch."""
        mine, branch = f"part-{self._place}-", f"part-{self._branch}"
        for name in [*self._memory.kept]:
            if name.startswith(branch) and not name.startswith(mine):
                del self._memory.kept[name]
        for path in () if self._store is None else self._store.glob(f"{branch}*"):
            if not path.name.startswith(mine):
                path.unlink(missing_ok=True)

    @property
    def held_bytes(self) -> int:
        """Bytes that all that the device keeps takes in memory."""
        mine = [
            snapshot
            for name, snapshot in self._memory.kept.items()
            if name.startswith(f"part-{self._device}")
        ]
        return sum(a.nbytes for s in mine for a in s.arrays.values()) + sum(
            recorded.nbytes
            for place, recorded in self._memory.recorded.items()
            if place.startswith(self._device)
        )

    def record(self, recorded: Recorded) -> None:
        """Keep what autograd recorded; other steps' recordings are freed."""
        kept = self._memory.recorded
        for place, other in [*kept.items()]:
            if place.startswith(self._device) and other.step != recorded.step:
                del kept[place]
        kept[self._place] = recorded

    def recorded(self) -> Recorded | None:
        """Return what autograd recorded, and forget it."""
        return self._memory.recorded.pop(self._place, None)

    def _name(self, kind: str) -> str:
        return f"part-{self._place}-{kind}.safetensors"


# --- the values that a device holds ---------------------------------------------------

HELD, GRADIENT, INPUTS = "held", "gradient", "inputs"


def settled(shelf: Shelf, task: PartTask) -> ServerOptimizer:
    """Return the values that a device holds, after the steps that a task counts.

    Raises
    ------
    Lacks
        It holds none that come to these.
    """
    gradient: Snapshot | None = None

    def fits(held: Snapshot) -> bool:
        nonlocal gradient
        values = held.values
        if values["sent_step"] != task.sent_step or values["steps"] > task.version:
            return False
        gradient = None
        if values["applied"] >= task.gradient_step:
            return True
        if values["steps"] == task.version:
            return False
        gradient = shelf.get(
            GRADIENT,
            lambda found: (
                found.values == {"step": task.gradient_step, "steps": values["steps"]}
            ),
        )
        return gradient is not None

    held = shelf.get(HELD, fits)
    if held is None:
        raise Lacks("values")
    optimizer = _optimizer(held)
    if optimizer.steps == task.version:
        return optimizer
    none = {n: np.zeros(v.shape, np.float32) for n, v in optimizer.state().items()}
    if gradient is not None:
        scale = np.float32(task.scale)
        optimizer.step({n: scale * g for n, g in gradient.arrays.items()})
    while optimizer.steps < task.version:
        optimizer.step({n: zeros.copy() for n, zeros in none.items()})
    applied = max(task.gradient_step, held.values["applied"])
    _keep(shelf, optimizer, task, applied)
    shelf.drop(GRADIENT)
    return optimizer


def received(
    shelf: Shelf,
    task: PartTask,
    values: list[npt.NDArray[np.float32]],
    moments: list[npt.NDArray[np.float32]],
) -> ServerOptimizer:
    """Take in the values that a device is to hold from now on.

    Parameters
    ----------
    shelf
        Where they are kept.
    task
        The task that they came with.
    values
        Values, part by part.
    moments
        For each part its moments, in the order of their names; none before any step.

    Raises
    ------
    MalformedRecord
        The task does not say what steps them.
    UserError
        The moments are not those of such an optimizer.
    """
    try:
        told = json.loads(task.optimizer)
        arguments, counts = dict(told["arguments"]), dict(told["counts"])
    except (ValueError, KeyError, TypeError):
        raise MalformedRecord(f"optimizer={task.optimizer[:80]!r} is none.") from None
    named = {str(index): value for index, value in enumerate(values)}
    optimizer = ServerOptimizer(named, **arguments)
    if task.version:
        keys = {name: [*m] for name, m in optimizer.moments(named).items()}
        each = len(moments) // max(len(named), 1)
        if any(len(own) != each for own in keys.values()):
            raise UserError(
                f"{each} moments of each value received, where "
                f"{arguments.get('optimizer')} keeps {len(keys['0'])}; use the same "
                "version of PyTorch on server and device."
            )
        optimizer.go_on(
            task.version,
            {
                name: dict(zip(own, moments[i * each :][:each], strict=True))
                for i, (name, own) in enumerate(keys.items())
            },
            counts,
        )
    shelf.drop_others()
    _keep(shelf, optimizer, task, applied=0)
    return optimizer


def keep_gradient(
    shelf: Shelf, task: PartTask, pieces: list[npt.NDArray[np.float32]]
) -> None:
    """Keep the gradient of a step until the server says whether it counts."""
    shelf.put(
        GRADIENT,
        Snapshot(
            {str(index): piece.copy() for index, piece in enumerate(pieces)},
            {"step": task.step, "steps": task.version},
        ),
    )


def _keep(
    shelf: Shelf, optimizer: ServerOptimizer, task: PartTask, applied: int
) -> None:
    snapshot = optimizer.snapshot()
    values = {
        **snapshot.values,
        "arguments": optimizer.arguments,
        "sent_step": task.sent_step,
        "applied": applied,
    }
    shelf.put(HELD, Snapshot(snapshot.arrays, values))


def _optimizer(held: Snapshot) -> ServerOptimizer:
    values = {
        name.removeprefix("model/"): array
        for name, array in held.arrays.items()
        if name.startswith("model/")
    }
    optimizer = ServerOptimizer(values, **held.values["arguments"])
    optimizer.restore(held)
    return optimizer
