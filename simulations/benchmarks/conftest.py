"""What benchmarks compare, in one table at the end, beside the machine's own figures.

A benchmark has the fixture ``compared``, and calls it for each ratio that it measured.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

_REPEATS = 5


@dataclass(frozen=True)
class Row:
    """Two sides that were measured in one run, in the same unit."""

    work: str
    ours: float
    peer: str
    theirs: float
    unit: str


_ROWS: list[Row] = []


@pytest.fixture
def compared() -> Callable[..., None]:
    """Take a row of the table: what was done, our figure, the peer and its figure."""

    def take(work: str, ours: float, peer: str, theirs: float, unit: str = "s") -> None:
        _ROWS.append(Row(work, ours, peer, theirs, unit))

    return take


def pytest_terminal_summary(terminalreporter) -> None:
    """Print all rows, if there are any."""
    if not _ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write("| work | ours | beside | its own | ratio |")
    write("|---|---:|---|---:|---:|")
    for row in _ROWS:
        write(
            f"| {row.work} | {row.ours:.3g} {row.unit} | {row.peer} | "
            f"{row.theirs:.3g} {row.unit} | {row.ours / row.theirs:.3f} |"
        )
    write("")
    write(f"This machine, after it: {_machine()}.")


def _machine() -> str:
    """Return what one core of this machine does, and its disk."""
    size = 1024
    matrix = np.ones((size, size), np.float32)
    product_s = _seconds(lambda: matrix @ matrix)
    source = np.ones(1 << 26, np.float32)
    there = np.ones_like(source)
    copy_s = _seconds(lambda: np.copyto(there, source))
    written_s = _seconds(_write_and_sync)
    return (
        f"sgemm {2e-9 * size**3 / product_s:.0f} GFLOP/s, "
        f"memcpy {1e-9 * source.nbytes / copy_s:.1f} GB/s, "
        f"64 MiB written and synced {64 / written_s:.0f} MiB/s"
    )


def _write_and_sync() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(1 << 26))
        os.fsync(file.fileno())


def _seconds(work: Callable[[], object]) -> float:
    times_s = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - begun)
    return float(np.median(times_s))
