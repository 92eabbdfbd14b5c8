"""Time of the exact allocator, and of a general solver on the same problem.

Run with ``pytest simulations/benchmarks/bench_allocation.py``. The fleets are random:
20 to 400 GFLOP/s, mean SNR 0 to 20 dB with Rayleigh fading, RoBERTa-base layers at
16 bit over 20 MHz.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

from lola_flwr.allocation import (
    AllocationProblem,
    RoundMode,
    SpanProblem,
    allocate,
    rotate,
    solve_spans,
)
from lola_flwr.allocation.edges import edges_of

PARAMETERS = 7.1e6
TOKENS = 16 * 64

# Peak resident memory of a process that states and solves the largest problem.
PEAK_LIMIT_BYTES = 2 * 2**30
PEAK_CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from bench_allocation import fleet_problem
from lola_flwr.allocation import allocate
from lola_flwr.machine.memory import peak_memory_bytes
allocate(fleet_problem(1_000_000, 24))
print(peak_memory_bytes())
"""


def fleet_problem(num_devices: int, num_blocks: int) -> AllocationProblem:
    """One round's problem of a random fleet."""
    rng = np.random.default_rng(num_devices)
    depth = num_blocks - np.arange(num_blocks)
    flops = 2 * PARAMETERS * TOKENS * (num_blocks + (depth - 1) + 2)
    flops_per_s = 2e10 * 20 ** rng.random(num_devices)
    snr = 10 ** rng.uniform(0, 2, num_devices) * rng.exponential(size=num_devices)
    upload_s = 16 * PARAMETERS / (20e6 * np.log2(1 + snr))
    compute_s = flops / flops_per_s[:, np.newaxis]
    upload_s = np.repeat(upload_s[:, np.newaxis], num_blocks, axis=1)
    # Read-only arrays that own their memory are taken over without a copy.
    compute_s.setflags(write=False)
    upload_s.setflags(write=False)
    return AllocationProblem(compute_s, upload_s)


@pytest.mark.parametrize(
    ("num_devices", "num_blocks", "rounds"),
    [(20, 12, 500), (1_000, 24, 50), (100_000, 24, 5), (1_000_000, 24, 3)],
)
def test_exact(benchmark, num_devices, num_blocks, rounds):
    problem = fleet_problem(num_devices, num_blocks)
    allocation = benchmark.pedantic(
        allocate, args=(problem,), rounds=rounds, warmup_rounds=1
    )
    allocation.check(problem)


def span_problem(num_devices: int, num_blocks: int) -> SpanProblem:
    """Return what each device would take for each span, with too few devices."""
    single = fleet_problem(num_devices, num_blocks)
    first, last = np.indices((num_blocks, num_blocks))
    length = np.maximum(last - first + 1, 1)
    a_layer_s = single.compute_s[:, -1] / (num_blocks + 2)
    return SpanProblem(
        compute_s=single.compute_s[:, :, np.newaxis]
        + a_layer_s[:, np.newaxis, np.newaxis] * (length - 1),
        full_band_upload_s=single.full_band_upload_s[:, :, np.newaxis] * length,
        feasible=np.ones((num_devices, num_blocks, num_blocks), bool),
        worth=np.ones(num_blocks),
    )


@pytest.mark.parametrize(
    ("num_devices", "num_blocks", "largest_gap"),
    [(2, 12, 0.0), (6, 24, 0.0), (10, 24, 0.0), (16, 24, 1e-5), (30, 48, 1e-5)],
)
def test_fewer_devices_than_blocks(
    benchmark, capsys, num_devices, num_blocks, largest_gap
):
    problem = span_problem(num_devices, num_blocks)
    cover = benchmark.pedantic(solve_spans, args=(problem,), rounds=5, warmup_rounds=1)
    gap = cover.deadline_s / cover.bound_s - 1
    assert cover.is_whole
    assert gap <= largest_gap
    # Against as many devices as blocks, which is the assignment problem.
    alone = fleet_problem(num_blocks, num_blocks)
    times_s = []
    for _ in range(20):
        started = time.perf_counter()
        allocate(alone)
        times_s.append(time.perf_counter() - started)
    if benchmark.stats is None:
        return
    ratio = benchmark.stats.stats.median / float(np.median(times_s))
    with capsys.disabled():
        print(
            f"\n{num_devices} devices, {num_blocks} blocks: gap {gap:.1e}, {ratio:.0f} "
            f"times as long as {num_blocks} devices"
        )


def cpu_seconds(solve) -> float:
    started = time.process_time()
    solve()
    return time.process_time() - started


def medians_s(ways, repetitions: int) -> list[float]:
    """CPU time of each way, taken in turns."""
    times_s = [[cpu_seconds(way) for way in ways] for _ in range(repetitions)]
    return np.median(times_s, axis=0).tolist()


@pytest.mark.parametrize(
    ("num_devices", "num_blocks", "repetitions"),
    [(20, 12, 21), (100, 24, 11), (1_000, 24, 11), (100_000, 24, 5)],
)
def test_jbba_beside_exact(compared, num_devices, num_blocks, repetitions):
    problem = fleet_problem(num_devices, num_blocks)
    ways = [partial(allocate, problem, name) for name in ("exact", "jbba")]
    exact_s, jbba_s = medians_s(ways, repetitions)
    compared(f"JBBA, {num_devices:,} x {num_blocks}", jbba_s, "exact", exact_s)


def test_others_beside_exact_in_a_fleet_of_a_million(compared):
    problem = fleet_problem(1_000_000, 24)
    best = allocate(problem)
    meetings = np.random.default_rng(0).integers(0, 3, problem.compute_s.shape)
    names = ("exact", "crunch", "crunch+shares", "greedy")
    ways = [partial(allocate, problem, name) for name in names]
    ways.append(partial(rotate, problem, best, meetings, eps=0.1))
    exact_s, *others_s = medians_s(ways, 3)
    for name, seconds in zip((*names[1:], "rotation"), others_s, strict=True):
        compared(f"{name}, 1,000,000 x 24", seconds, "exact", exact_s)


@pytest.mark.parametrize("devices_per_block", [1, 20, 40])
def test_several_devices_a_block(benchmark, devices_per_block):
    mode = RoundMode(devices_per_block=devices_per_block)
    problem = replace(fleet_problem(1_000, 24), mode=mode)
    allocation = benchmark.pedantic(
        allocate, args=(problem,), rounds=20, warmup_rounds=1
    )
    allocation.check(problem)


def test_peak_memory_of_a_million_devices(capsys):
    done = subprocess.run(
        [sys.executable, "-c", PEAK_CODE, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak_bytes = int(done.stdout)
    with capsys.disabled():
        print(f"\n1,000,000 devices x 24 blocks: peak {peak_bytes / 2**30:.2f} GiB")
    assert peak_bytes < PEAK_LIMIT_BYTES


def milp_band(problem: AllocationProblem, deadline_s: float) -> float:
    """Least total share that meets a deadline, as a mixed-integer program (HiGHS)."""
    share = edges_of(problem).least_share(deadline_s)
    rows, columns = np.nonzero(share < 1.0)
    constraints = one_per_device_and_block(
        tuple(rows.tolist()), tuple(columns.tolist()), share.shape
    )
    solved = milp(
        share[rows, columns],
        constraints=constraints,
        integrality=np.ones(rows.size),
        bounds=Bounds(0, 1),
    )
    return float(solved.fun) if solved.success else np.inf


@lru_cache(maxsize=2)
def one_per_device_and_block(rows, columns, shape):
    edges = np.arange(len(rows))
    ones = np.ones(len(rows))
    per_device = coo_array((ones, (rows, edges)), shape=(shape[0], len(rows)))
    per_block = coo_array((ones, (columns, edges)), shape=(shape[1], len(rows)))
    return (
        LinearConstraint(csr_array(per_device), ub=np.ones(shape[0])),
        LinearConstraint(csr_array(per_block), lb=1, ub=1),
    )


def milp_bisection(problem: AllocationProblem, rel_tol: float = 1e-6) -> float:
    """Least latency by bisection on the deadline, one program for each."""
    high = allocate(problem, "crunch+shares").round_s
    low = 0.0
    while high - low > rel_tol * high:
        middle = 0.5 * (low + high)
        if milp_band(problem, middle) <= 1.0:
            high = middle
        else:
            low = middle
    return high


@pytest.mark.parametrize(("num_devices", "num_blocks"), [(20, 12), (100, 12)])
def test_peer_milp(benchmark, capsys, compared, num_devices, num_blocks):
    problem = fleet_problem(num_devices, num_blocks)
    times_s = []
    for _ in range(20):
        started = time.perf_counter()
        allocation = allocate(problem)
        times_s.append(time.perf_counter() - started)
    exact_s = float(np.median(times_s))
    started = time.perf_counter()
    latency_s = benchmark.pedantic(milp_bisection, args=(problem,), rounds=1)
    milp_s = time.perf_counter() - started
    assert latency_s == pytest.approx(allocation.round_s, rel=2e-6)
    work = f"exact optimum, {num_devices} x {num_blocks}"
    compared(work, exact_s, "HiGHS in a bisection", milp_s)
    with capsys.disabled():
        print(
            f"\n{num_devices} x {num_blocks}: exact {exact_s * 1e3:.2f} ms, "
            f"HiGHS milp in a bisection {milp_s * 1e3:.0f} ms, "
            f"ratio {milp_s / exact_s:.0f}"
        )
