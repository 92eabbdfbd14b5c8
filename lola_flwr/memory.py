"""Measure the memory that a computation takes at its peak, and keep that peak low."""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# Written to the file above, this sets the peak of the resident set to its present size.
_RESET_PEAK = "5"
_SAMPLE_INTERVAL_S = 0.002

# Of glibc's mallopt. Left alone the threshold grows with the blocks that are freed, and
# tensors of many sizes fragment the heap.
_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 1 << 16


class measured_peak:
    """Measure by how much a ``with`` raises the memory in use at its peak.

    On a GPU this is what its allocator gave out. On a CPU it is the growth of the
    process's resident set: on Linux as the kernel keeps it, elsewhere as a thread
    samples it. What other threads of the process take counts, too.

    Parameters
    ----------
    device
        Where the computation runs.

    Attributes
    ----------
    peak_bytes
        The growth; after the ``with``.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.peak_bytes = 0
        self._before = 0
        self._sampler: _Sampler | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        give_back_freed_memory()
        self._before = _resident_bytes()
        if not _reset_peak():
            self._sampler = _Sampler()
            self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        elif self._sampler is not None:
            peak = self._sampler.stop()
        else:
            peak = _status_bytes("VmHWM")
        self.peak_bytes = max(0, peak - self._before)


def keep_no_freed_memory() -> None:
    """Let the C library return a tensor's memory as soon as it is freed, from now on.

    Otherwise the process holds up to a third more at its peak than it has in use,
    measured on training steps. Only glibc's allocator can be told so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform == "linux" and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


class _Sampler(threading.Thread):
    """Notes the largest resident set that it sees."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until it is stopped."""
        while not self._stopped.wait(_SAMPLE_INTERVAL_S):
            self._peak = max(self._peak, _resident_bytes())

    def stop(self) -> int:
        """Return the largest resident set, bytes."""
        self._stopped.set()
        self.join()
        return max(self._peak, _resident_bytes())


def _resident_bytes() -> int:
    if sys.platform == "linux":
        return _status_bytes("VmRSS")
    import psutil

    return int(psutil.Process().memory_info().rss)


def _reset_peak() -> bool:
    """Let the kernel's peak start from now; False where it cannot be told to."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{_STATUS} does not tell {field}.")


def give_back_freed_memory() -> None:
    """Let the C library return what it holds free, lest it be taken for in use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        if trim is not None:
            trim(0)
