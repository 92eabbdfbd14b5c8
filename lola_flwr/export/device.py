"""A device that trains its block with an exported program, without PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lola_flwr.device.base_model import check_fingerprint
from lola_flwr.device.contract import LocalUpdate, OutOfMemory, nothing_report
from lola_flwr.device.encoding import encoded_gradients
from lola_flwr.device.sensors import reports_energy
from lola_flwr.device.sent_model import sent_model
from lola_flwr.device.store import LostCopy
from lola_flwr.errors import UserError
from lola_flwr.export.batches import ArrayBatch, fitted, num_examples
from lola_flwr.export.manifest import ExportManifest, ProgramSpec
from lola_flwr.export.runner import Runner
from lola_flwr.machine.memory import available_memory_bytes
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.packing import GRADIENTS
from lola_flwr.wire.records import (
    Assignment,
    PartTask,
    UpdateReport,
)

# Gives a mini-batch: (number of the round, batch_size) -> arguments of the model.
ArrayBatchSource = Callable[[int, int], ArrayBatch]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedDevice:
    """Trains the block that the server assigns, on the device's own data.

    It computes without dropout, and as its programs were exported: it refuses what
    these do not do.

    Parameters
    ----------
    profile
        What this device offers; besides, that it trains one block alone, with batches
        of its programs' size.
    manifest
        What was exported.
    runner
        Runs the programs.
    batch_source
        Draws a mini-batch from the device's data. What is smaller than the programs'
        batch is filled up, where that changes nothing (`lola_flwr.export.batches`).
    batch_weight
        What the loss of a mini-batch is a mean over, by which the server weighs its
        gradient (default: its examples); as for `BlockDevice`.
    store
        As for `BlockDevice`.
    simulated_compute_s
        As for `BlockDevice`.
    """

    profile: DeviceProfile
    manifest: ExportManifest
    runner: Runner
    batch_source: ArrayBatchSource
    batch_weight: Callable[[ArrayBatch], int] = num_examples
    store: Path | None = None
    simulated_compute_s: Callable[[Assignment], float] | None = None

    def __post_init__(self) -> None:
        profile = replace(
            self.profile, trains_one_block=True, batch_size=self.manifest.batch_size
        )
        object.__setattr__(self, "profile", profile)

    @reports_energy
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
            The model's trainable values, as for `BlockDevice`.

        Raises
        ------
        UserError
            Server and device do not hold the same model, or no program does what is
            asked.
        MalformedManifest
            The values are not those that the server sent.
        OutOfMemory
            The memory does not suffice.
        """
        start = time.perf_counter()
        check_fingerprint(self.manifest.base_fingerprint, assignment)
        _refuse_other_work(assignment)
        program = self.manifest.program(assignment.block_index)
        shapes = {value.name: value.shape for value in self.manifest.values}
        try:
            received, held = sent_model(values, assignment.manifest, shapes, self.store)
        except LostCopy:
            return LocalUpdate({}, 0, nothing_report(assignment))
        taken = _checked(received, self.manifest)
        if self.simulated_compute_s is None:
            self._refuse_lack_of_memory(program)
        batch = self.batch_source(assignment.server_round, assignment.batch_size)
        weight = self.batch_weight(batch)
        if not weight:
            raise UserError(
                "The loss of a mini-batch is a mean over nothing: no token of it has a "
                "label; give it examples that have."
            )
        loss, *found = self.runner.run(
            program.block, [*taken, *fitted(batch, self.manifest)]
        )
        names = [spec.name for spec in program.gradients]
        encoded = encoded_gradients(
            dict(zip(names, found, strict=True)),
            self.manifest.partition,
            assignment,
            store=self.store,
            device=self.profile.name,
        )
        simulated = self.simulated_compute_s
        report = UpdateReport(
            server_round=assignment.server_round,
            block_index=assignment.block_index,
            update_kind="gradient",
            loss=float(loss),
            compute_s=(
                time.perf_counter() - start
                if simulated is None
                else simulated(assignment)
            ),
            compute_clock="measured" if simulated is None else "simulated",
            held=held,
            peak_memory_bytes=(
                self.runner.peak_memory_bytes if simulated is None else None
            ),
        )
        return LocalUpdate({GRADIENTS: encoded}, weight, report)

    def _refuse_lack_of_memory(self, program: ProgramSpec) -> None:
        arrays = (*self.manifest.inputs, *program.gradients)
        needed_bytes = program.arena_bytes + sum(spec.nbytes for spec in arrays)
        # What an earlier step took, the runner still has.
        held_bytes = self.runner.peak_memory_bytes or 0.0
        free_bytes = available_memory_bytes() + held_bytes
        if free_bytes < needed_bytes:
            raise OutOfMemory(
                f"block {program.block} needs {needed_bytes:.3g} B, there are "
                f"{free_bytes:.3g} B"
            )

    def compute_part(
        self, task: PartTask, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> NoReturn:
        """Refuse: a program trains a block, and knows no parts of a model.

        Raises
        ------
        UserError
            Always.
        """
        raise UserError(
            "A device with exported programs trains blocks, and does not hold parts of "
            "a model that is spread over devices; use devices with PyTorch for D2FT."
        )


def _checked(
    values: Sequence[npt.NDArray[Any]], manifest: ExportManifest
) -> list[npt.NDArray[np.float32]]:
    """Return values as programs take them, after a check that they fit."""
    if len(values) != len(manifest.values):
        raise UserError(
            f"{len(values)} arrays received; {manifest.model!r} has "
            f"{len(manifest.values)} trainable ones. Server and device use different "
            "models."
        )
    for array, spec in zip(values, manifest.values, strict=True):
        if array.shape != spec.shape or array.dtype.kind != "f":
            raise UserError(
                f"{spec.name} has shape {spec.shape} here but is {array.dtype}"
                f"{list(array.shape)} at the server; use the same model on both."
            )
    return [np.ascontiguousarray(array, np.float32) for array in values]


def _refuse_other_work(assignment: Assignment) -> None:
    asked = {
        "without back-propagation (zeroth-order)": assignment.direction_seed,
        "under a schedule of operations": assignment.operations,
        "several blocks together": assignment.further_blocks,
        "to return weights": assignment.update_names,
    }
    for what, value in asked.items():
        if value is not None:
            raise UserError(
                f"The server asks this device to train {what}, and its programs train "
                "one block by back-propagation; have devices with PyTorch do that."
            )
