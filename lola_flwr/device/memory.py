"""Measure the memory that a computation takes at its peak, and keep that peak low."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import torch

from lola_flwr.machine.heap import give_back_freed_memory
from lola_flwr.machine.memory import (
    peak_memory_bytes,
    reset_peak_memory,
    resident_memory_bytes,
)
from lola_flwr.machine.sampling import Sampler

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self

_SAMPLE_INTERVAL_S = 0.002


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
        self._peak = 0
        self._sampler: Sampler | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        give_back_freed_memory()
        self._before = resident_memory_bytes()
        if not reset_peak_memory():
            self._sampler = Sampler(self._sample, _SAMPLE_INTERVAL_S)
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
            self._sampler.stop()
            peak = self._peak
        else:
            peak = peak_memory_bytes()
        self.peak_bytes = max(0, peak - self._before)

    def _sample(self) -> bool:
        self._peak = max(self._peak, resident_memory_bytes())
        return True
