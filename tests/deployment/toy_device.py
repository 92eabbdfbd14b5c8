"""A device function whose device trains nothing: it answers with what it got."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from lola_flwr.device.contract import LocalUpdate, OutOfMemory
from lola_flwr.errors import UserError
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.records import PartReport, UpdateReport

made = []


class ToyDevice:
    profile = DeviceProfile("toy", 1e9, 1e9, 10.0, uplink_bps=4e6)

    def __init__(self, run_config):
        self._config = run_config

    def train(self, assignment, values):
        if self._config.get("fail") == "memory":
            raise OutOfMemory("4 GiB")
        if self._config.get("fail") == "user":
            raise UserError("The toy is broken.")
        if self._config.get("fail") == "app":
            raise KeyError("toy")
        # Trains until a file is there.
        until = Path(self._config.get("train-until", "."))
        while not until.exists():
            time.sleep(0.01)
        report = UpdateReport(
            server_round=assignment.server_round,
            block_index=assignment.block_index,
            update_kind="gradient",
            loss=float(len(made)),
            compute_s=0.5,
            compute_clock="measured",
        )
        arrays = {name: np.asarray(array) * 2 for name, array in values.items()}
        if assignment.direction_seed is not None:
            report = replace(report, projections=b"\x00\x01\xff")
        return LocalUpdate(arrays, os.getpid(), report)

    def compute_part(self, task, arrays):
        report = PartReport(kind=task.kind, step=task.step, losses=b"\xff\x00")
        return report, {name: np.asarray(array) * 2 for name, array in arrays.items()}


def device_fn(context):
    made.append(context)
    return ToyDevice(context.run_config)
