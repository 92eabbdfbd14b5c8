"""What a device says of itself: its memory, its processor, its power mode."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_DEVICE_TREE_MODEL = Path("/proc/device-tree/model")


def available_memory_bytes() -> int:
    """Return the memory that a process can still get, in bytes.

    Linux counts it itself (``MemAvailable``); a container's limit counts too, if it is
    lower. Elsewhere psutil tells.
    """
    try:
        text = (_PROC / "meminfo").read_text(encoding="ascii")
    except OSError:
        import psutil

        return int(psutil.virtual_memory().available)
    fields = dict(line.split(":", 1) for line in text.splitlines())
    available = 1024 * int(fields["MemAvailable"].split()[0])
    return min(available, _left_in_group(Path("/sys/fs/cgroup")))


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


def reset_peak_memory() -> bool:
    """Let the peak of this process's memory begin anew; tell whether Linux did."""
    try:
        (_PROC / "self" / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int:
    """Return this process's largest resident memory since the last reset, in bytes."""
    return _status_bytes("VmHWM")


def resident_memory_bytes() -> int:
    """Return this process's resident memory, in bytes."""
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    text = (_PROC / "self" / "status").read_text(encoding="ascii", errors="replace")
    for line in text.splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return 0


def _left_in_group(group: Path) -> int:
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        return max(int(limit) - used, 0)
    # No such group, or no limit ("max").
    except (OSError, ValueError):
        return 1 << 62
