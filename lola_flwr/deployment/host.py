"""What a device says of itself: its processor, its power mode."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_DEVICE_TREE_MODEL = Path("/proc/device-tree/model")


def describe_host() -> dict[str, Any]:
    """Return what identifies this host: for people, and to compare two profiles."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }
    model = jetson_model()
    if model is not None:
        found["jetson"] = model
        found["power-mode"] = jetson_power_mode()
    return found


def accelerator() -> str | None:
    """Return which accelerator PyTorch can use here; None if there is none.

    Raises
    ------
    ImportError
        There is no PyTorch.
    """
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)} (CUDA)"
    return "Apple GPU (MPS)" if torch.backends.mps.is_available() else None


def jetson_model(path: Path = _DEVICE_TREE_MODEL) -> str | None:
    """Return which Jetson this is; None on another device."""
    try:
        model = path.read_text(encoding="utf-8").rstrip("\0\n")
    except OSError:
        return None
    return model if "jetson" in model.lower() else None


def jetson_power_mode() -> str | None:
    """Return a Jetson's power mode, as nvpmodel names it; None if it does not tell."""
    program = shutil.which("nvpmodel")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "-q"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_power_mode(done.stdout)


def parse_power_mode(printed: str) -> str | None:
    """Read the mode out of what ``nvpmodel -q`` prints: ``NV Power Mode: 15W``."""
    for line in printed.splitlines():
        label, colon, mode = line.partition(":")
        if colon and label.strip().lower() == "nv power mode":
            return mode.strip()
    return None
