"""Time of encoding a gradient, beside copying it and beside formulas on whole arrays.

Run with ``pytest simulations/benchmarks/bench_codecs.py -s``. The gradient has as many
values as a layer of RoBERTa-base. The formulas are those that the codecs had before
they went over arrays in parts; payloads are equal bit by bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from lola_flwr.wire.codec import codec_named

REPETITIONS = 15


def whole_bf16(values):
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.where(np.isnan(values), np.uint32(0x7FC00000), rounded)
    return (rounded >> np.uint32(16)).astype(np.uint16)


def whole_int8(values):
    with np.errstate(invalid="ignore"):
        largest = np.abs(values).max(axis=1, initial=0.0)
        scale = (largest / 127).astype("<f4")
        levels = np.rint(values / np.where(scale > 0, scale, 1)[:, np.newaxis])
        levels = np.clip(levels, -127, 127).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), levels.view(np.uint8).ravel()])


def whole_top_k(fraction: float) -> Callable[[np.ndarray], np.ndarray]:
    def encode(values):
        flat = values.ravel()
        first = flat.size - int(np.ceil(fraction * flat.size))
        largest = np.argpartition(np.abs(flat), first)[first:]
        positions = np.sort(largest).astype(np.uint32)
        return np.concatenate(
            [positions.view(np.uint8), whole_bf16(flat[positions]).view(np.uint8)]
        )

    return encode


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("topk:0.001", whole_top_k(0.001)),
        ("topk:0.01", whole_top_k(0.01)),
        ("topk:0.1", whole_top_k(0.1)),
        ("bf16", whole_bf16),
        ("int8", whole_int8),
    ],
)
def test_encode(compared, name, before):
    values = np.random.default_rng(0).standard_normal((9232, 768), dtype=np.float32)
    now = codec_named(name).encode
    assert now(values).tobytes() == before(values).tobytes()
    ways = (now, before, np.copy)
    times_s = np.array(
        [[_seconds(way, values) for way in ways] for _ in range(REPETITIONS)]
    )
    now_s, before_s, copy_s = np.median(times_s, axis=0)
    compared(f"{name} encode, 28 MB", now_s, "whole arrays", before_s)
    compared(f"{name} encode, 28 MB", now_s, "a copy", copy_s)


def _seconds(way, values):
    started = time.perf_counter()
    way(values)
    return time.perf_counter() - started
