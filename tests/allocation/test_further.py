"""Blocks above devices' own: brute force hardly ever finds a better round."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import (
    BatchProblem,
    FurtherProblem,
    further_blocks,
    own_batches,
    progress,
)
from lola_flwr.allocation.shares import best_deadline

_INSTANCES = 100


def small_problem(rng: np.random.Generator) -> FurtherProblem:
    """Draw an instance of which all last blocks and batches can be tried."""
    devices = int(rng.integers(1, 4))
    blocks = int(rng.integers(devices, 5))
    first = np.sort(rng.choice(blocks, devices, replace=False))
    most = rng.integers(2, 9, devices)
    return FurtherProblem(
        first=first,
        last=np.array([rng.integers(own, blocks) for own in first]),
        fixed_s=rng.uniform(0, 1, devices),
        example_s=rng.uniform(0.01, 0.5, devices),
        further_example_s=rng.uniform(0, 0.05, (devices, blocks)),
        upload_s=10 ** rng.uniform(-2, 1, devices) * (rng.random(devices) < 0.9),
        further_upload_s=np.tile(10 ** rng.uniform(-2, 0.5, (devices, 1)), blocks),
        noise_scale=10 ** rng.uniform(0, 3, blocks),
        weight=rng.integers(1, 4, blocks) / blocks,
        least=np.ones(devices, np.int64),
        most=most,
        most_further=np.minimum(most, rng.integers(1, 9, devices)),
        constant_s=float(rng.integers(0, 2) * rng.random()),
        pace=10 ** rng.uniform(-3, 0),
    )


def gain_of(problem: FurtherProblem, last, batch_size) -> float:
    """What a round brings beyond its time, written out device by device."""
    examples = np.zeros(problem.weight.size)
    compute_s, upload_s = [], []
    for device, (own, end, size) in enumerate(
        zip(problem.first, last, batch_size, strict=True)
    ):
        examples[own : end + 1] += size
        more = slice(own + 1, end + 1)
        each_s = problem.example_s[device] + sum(
            problem.further_example_s[device, more]
        )
        compute_s.append(problem.fixed_s[device] + each_s * size)
        further_s = sum(problem.further_upload_s[device, more])
        upload_s.append(problem.upload_s[device] + further_s)
    brought = float(problem.weight @ progress(examples, problem.noise_scale))
    round_s = problem.constant_s + best_deadline(
        np.array(compute_s), np.array(upload_s)
    )
    return brought - problem.pace * round_s


def alone(problem: FurtherProblem) -> BatchProblem:
    """Return the problem of the devices' batches for their own blocks."""
    return BatchProblem(
        fixed_s=problem.fixed_s,
        example_s=problem.example_s,
        full_band_upload_s=problem.upload_s,
        noise_scale=problem.noise_scale[problem.first],
        weight=problem.weight[problem.first],
        least=problem.least,
        most=problem.most,
        constant_s=problem.constant_s,
        pace=problem.pace,
    )


def brute_force(problem: FurtherProblem) -> float:
    ends = [range(a, b + 1) for a, b in zip(problem.first, problem.last, strict=True)]
    best = -np.inf
    for last in itertools.product(*ends):
        tops = np.where(last > problem.first, problem.most_further, problem.most)
        for batch_size in itertools.product(*(range(1, top + 1) for top in tops)):
            best = max(best, gain_of(problem, last, batch_size))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_brute_force_finds_hardly_anything_better(seed):
    rng = np.random.default_rng(seed)
    exact = 0
    for _ in range(_INSTANCES // 4):
        problem = small_problem(rng)
        begin = own_batches(alone(problem)).batch_size
        last, batch_size = further_blocks(problem, begin)
        gain = gain_of(problem, last, batch_size)
        assert problem.gain(last, batch_size) == pytest.approx(gain, abs=1e-9)
        assert gain >= gain_of(problem, problem.first, begin) - 1e-12
        gap = brute_force(problem) - gain
        assert gap <= 0.2 * problem.progress(problem.examples(last, batch_size))
        exact += gap <= 1e-9
    assert exact >= 0.9 * _INSTANCES / 4


def test_nobody_leaves_its_bounds():
    rng = np.random.default_rng(7)
    for _ in range(200):
        problem = small_problem(rng)
        last, batch_size = further_blocks(problem, problem.most)
        assert ((problem.first <= last) & (last <= problem.last)).all()
        most = np.where(last > problem.first, problem.most_further, problem.most)
        assert ((problem.least <= batch_size) & (batch_size <= most)).all()


def test_what_costs_nothing_is_sent_and_what_costs_all_is_not():
    problem = replace(small_problem(np.random.default_rng(1)), pace=0.5)
    devices, blocks = problem.further_upload_s.shape
    free = replace(
        problem,
        last=np.full(devices, blocks - 1),
        most_further=problem.most,
        further_example_s=np.zeros((devices, blocks)),
        further_upload_s=np.zeros((devices, blocks)),
    )
    last, _ = further_blocks(free, problem.least)
    assert (last == blocks - 1).all()
    dear = replace(free, further_upload_s=np.full((devices, blocks), 1e3))
    last, _ = further_blocks(dear, problem.least)
    assert (last == problem.first).all()
