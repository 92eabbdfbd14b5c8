"""What a client asks of a device, whether it trains in this process or in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.records import (
    FAILURE_DETAIL_KEY,
    FAILURE_KEY,
    OUT_OF_MEMORY,
    Assignment,
    PartReport,
    PartTask,
    Scalar,
    UpdateReport,
)


@dataclass(frozen=True, eq=False)
class LocalUpdate:
    """What a device sends back.

    Parameters
    ----------
    arrays
        One array: the encoded gradients of the block and, if asked for, of the head, or
        their projections; none if the device could not train.
    num_examples
        Examples that they are over.
    report
        What the device says about them.
    """

    arrays: dict[str, npt.NDArray[np.generic]]
    num_examples: int
    report: UpdateReport


class OutOfMemory(Exception):
    """A device's memory does not suffice for what it was asked for."""

    def to_record(self) -> dict[str, Scalar]:
        """Return the report that takes the place of an update's."""
        return {FAILURE_KEY: OUT_OF_MEMORY, FAILURE_DETAIL_KEY: str(self)}


class Device(Protocol):
    """A device that trains blocks."""

    @property
    def profile(self) -> DeviceProfile:
        """What the device offers."""

    def train(
        self,
        assignment: Assignment,
        values: Mapping[str, npt.NDArray[Any]],
    ) -> LocalUpdate:
        """Compute the mean gradient of the assigned block on one mini-batch.

        Parameters
        ----------
        assignment
            What the server asks for.
        values
            The trainable values that it sent, as `received_values` reads them.

        Raises
        ------
        OutOfMemory
            The device's memory does not suffice.
        """

    def compute_part(
        self, task: PartTask, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[PartReport, dict[str, npt.NDArray[Any]]]:
        """Do a part of a step, where the model is spread over devices.

        Parameters
        ----------
        task
            What the server asks for.
        arrays
            What came with it.

        Returns
        -------
        What the arrays are that go back, and these arrays.
        """


def nothing_report(assignment: Assignment) -> UpdateReport:
    """Return the report of a device that lacks what the server believed it to hold."""
    return UpdateReport(
        server_round=assignment.server_round,
        block_index=assignment.block_index,
        update_kind="nothing",
        loss=None,
        compute_s=None,
        compute_clock="",
    )
