"""Time of the search for the most valuable blocks, at its worst.

Run with ``pytest simulations/benchmarks/bench_latency_target.py -s``. In the instances
payloads are the same on all devices, or nearly, and values nearly proportional to them.
"""

from __future__ import annotations

import time

import numpy as np

from lola_flwr.allocation import AllocationProblem, InfeasibleAllocation, allocate
from lola_flwr.planning.latency_target import choose_blocks

INSTANCES = 500
LIMIT_S = 0.5


def instance(seed: int) -> tuple[AllocationProblem, np.ndarray, float]:
    """Draw a problem, values and a target that not all blocks fit."""
    rng = np.random.default_rng(seed)
    num_devices = int(rng.choice([12, 20, 40, 100]))
    num_blocks = int(rng.choice([6, 12, 24, 36]))
    upload_s = rng.uniform(0.5, 4, num_blocks) * rng.choice([1, 0.1])
    upload_s = np.tile(upload_s, (num_devices, 1))
    if seed % 3 == 2:
        upload_s *= 1 + 1e-3 * rng.random((num_devices, 1))
    depth = num_blocks - np.arange(num_blocks)
    compute_s = np.outer(20.0 ** -rng.random(num_devices), depth + 1)
    compute_s *= rng.choice([0.01, 0.1, 1.0])
    if seed % 4 == 3:
        compute_s[:] = compute_s.mean() * rng.random()
    spread = rng.choice([0, 1e-6, 1e-4, 1e-2])
    values = upload_s[0] * (1 + spread * rng.random(num_blocks))
    some = slice(min(num_blocks, num_devices))
    whole = AllocationProblem(compute_s[:, some], upload_s[:, some])
    target_s = allocate(whole).round_s * rng.uniform(0.2, 0.9)
    return AllocationProblem(compute_s, upload_s), values, target_s


def test_never_exceeds_its_limit(capfd):
    seconds, gaps, undisturbed = [], [], []
    for seed in range(INSTANCES):
        problem, values, target_s = instance(seed)
        started, cpu_started = time.perf_counter(), time.process_time()
        try:
            chosen = choose_blocks(problem, values, latency_target_s=target_s)
        except InfeasibleAllocation:
            continue
        seconds.append(time.perf_counter() - started)
        # Another process may have had the core.
        undisturbed.append(time.process_time() - cpu_started > 0.95 * seconds[-1])
        gaps += [] if chosen.gap is None else [chosen.gap]
    longest_s = max(s for s, alone in zip(seconds, undisturbed, strict=True) if alone)
    assert capfd.readouterr() == ("", "")
    with capfd.disabled():
        print(
            f"\n{len(seconds)} instances: median {np.median(seconds):.2f} s, longest "
            f"{max(seconds):.3f} s, {longest_s:.3f} s of the {sum(undisturbed)} that "
            f"had the core for themselves; {len(gaps)} ended at the limit, gap at most "
            f"{max(gaps):.1%}"
        )
    assert longest_s < 1.1 * LIMIT_S
