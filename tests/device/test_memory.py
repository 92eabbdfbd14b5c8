from __future__ import annotations

import time

import pytest
import torch

from lola_flwr.device import memory
from lola_flwr.device.memory import measured_peak
from lola_flwr.machine.heap import keep_no_freed_memory

_MIB = 1 << 20


def touch(mib):
    """Take and write to some memory, and give it back."""
    del_me = torch.ones(mib * _MIB, dtype=torch.uint8)
    time.sleep(0.05)  # a thread that samples may come late
    return int(del_me[0])


@pytest.mark.parametrize("kernel_tells", [True, False])
def test_peak_is_what_was_taken_though_it_was_given_back(monkeypatch, kernel_tells):
    if not kernel_tells:
        monkeypatch.setattr(memory, "reset_peak_memory", lambda: False)
    keep_no_freed_memory()
    touch(100)  # an earlier peak does not count
    with measured_peak() as small:
        touch(8)
    with measured_peak() as large:
        touch(64)
        touch(32)
    assert small.peak_bytes / _MIB == pytest.approx(8, abs=4)
    assert large.peak_bytes / _MIB == pytest.approx(64, abs=8)


def test_memory_that_was_there_before_does_not_count():
    kept = torch.ones(32 * _MIB, dtype=torch.uint8)
    with measured_peak() as peak:
        kept.add_(1)
    assert peak.peak_bytes < 8 * _MIB
