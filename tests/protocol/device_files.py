"""A native device with programs of the recorded model, and how it is started."""

from __future__ import annotations

import json
import signal
import subprocess
from contextlib import contextmanager
from functools import cache

import numpy as np

from lola_flwr.export.write import export_steps
from tests.export.programs import built_device
from tests.export.small import scratch
from tests.protocol import recorded

WAIT_S = 60


@cache
def device_files():
    """Export the recorded model; write examples and profile beside it."""
    directory = scratch()
    export_steps(recorded.what_is_exported(), directory / "steps")
    (directory / "data").mkdir()
    for name, array in recorded.examples().items():
        np.save(directory / "data" / f"{name}.npy", array)
    (directory / "device.json").write_text(
        json.dumps({"lola-flwr-profile": 1, **recorded.PROFILE.to_properties()})
    )
    return directory


def command(address, *options, data="data", steps="steps", insecure=True):
    """Return how a device is started; ``data`` and ``steps`` may be elsewhere."""
    directory = device_files()
    return [
        *(built_device(), directory / steps, "--superlink", address),
        *("--profile", directory / "device.json", "--data", directory / data),
        *("--seed", str(recorded.SEED), *["--insecure"] * insecure, *options),
    ]


@contextmanager
def running(address, *options, **how):
    """Run a device; give it, and let it leave in the end."""
    process = subprocess.Popen(
        list(map(str, command(address, *options, **how))),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.said = process.communicate(timeout=WAIT_S)[1]
