"""A device with power sensors says what its training took of its battery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, Protocol, TypeVar

from lola_flwr.device.contract import LocalUpdate
from lola_flwr.machine.power import measured_energy
from lola_flwr.wire.records import Assignment


class MaybeSimulated(Protocol):
    """A device that may be simulated."""

    @property
    def simulated_compute_s(self) -> Callable[[Assignment], float] | None:
        """What tells how long a simulated device takes."""


D = TypeVar("D", bound=MaybeSimulated)
Train = Callable[[D, Assignment, Any], LocalUpdate]


def reports_energy(train: Train[D]) -> Train[D]:
    """Let the report of a device's train method say what its sensors measured.

    A simulated device has none: those of its host say nothing about it.
    """

    @wraps(train)
    def measured(device: D, assignment: Assignment, values: Any) -> LocalUpdate:
        if device.simulated_compute_s is not None:
            return train(device, assignment, values)
        with measured_energy() as energy:
            update = train(device, assignment, values)
        if energy.joules is None or update.report.compute_s is None:
            return update
        return replace(update, report=replace(update.report, compute_j=energy.joules))

    return measured
