"""Brute force over all matchings, and generators of problems.

Shares no code with the package: the root of the shares' sum is found by bisection, the
least share of a power-limited device by Lambert's function.
"""

import itertools
from functools import lru_cache

import numpy as np
from scipy.special import lambertw

from lola_flwr.allocation import AllocationProblem, PowerLimitedUplink, RoundMode


@lru_cache(maxsize=64)
def _all_maps(num_devices, slots, everyone):
    """Devices and blocks of every matching, two arrays (M, A)."""
    if everyone:
        blocks = sorted(set(slots))
        maps = np.array(list(itertools.product(blocks, repeat=num_devices)))
        enough = np.all(
            [(maps == b).sum(axis=1) >= slots.count(b) for b in blocks], axis=0
        )
        maps = maps[enough]
        return np.broadcast_to(np.arange(num_devices), maps.shape), maps
    chosen = list(itertools.permutations(range(num_devices), len(slots)))
    devices = np.array(chosen, dtype=np.int64).reshape(len(chosen), len(slots))
    return devices, np.broadcast_to(np.array(slots), devices.shape)


def matchings(problem):
    """All matchings that the problem's mode allows, devices and blocks (M, A)."""
    demand = np.zeros(problem.num_blocks, dtype=int)
    blocks = problem.mode.blocks
    demand[list(range(problem.num_blocks) if blocks is None else blocks)] = 1
    demand = demand * np.asarray(problem.mode.devices_per_block)
    slots = tuple(np.repeat(np.arange(problem.num_blocks), demand).tolist())
    everyone = problem.mode.participation == "all"
    devices, blocks = _all_maps(problem.num_devices, slots, everyone)
    possible = problem.feasible[devices, blocks].all(axis=1)
    return devices[possible], blocks[possible]


def least_share(tau, left, snr):
    """Share that uploads within the time left; infinite if no band would do."""
    with np.errstate(all="ignore"):
        rate = np.where(left > 0, tau / left, np.where(tau == 0, 0.0, np.inf))
        if snr is None:
            return rate
        a = rate * np.log1p(snr) / snr
        v = -lambertw(-a * np.exp(-a), k=-1).real / a
        share = np.where(a < 1, snr / (v - 1), np.inf)
        return np.where(rate == 0, 0.0, share)


def brute_force_s(problem):
    """Least latency over all matchings with their best shares; inf if infeasible."""
    devices, blocks = matchings(problem)
    if not devices.size:
        return np.inf
    c = problem.compute_s[devices, blocks]
    tau = problem.full_band_upload_s[devices, blocks]
    snr = None
    if problem.power_limited is not None:
        snr = problem.power_limited.snr[devices]
    # Nobody has more than the whole band; shares of tau / sum tau end it by `high`.
    low = (c + tau).max(axis=1)
    high = c.max(axis=1) + tau.sum(axis=1)
    keep = low <= high.min()
    c, tau, low, high = c[keep], tau[keep], low[keep], high[keep]
    snr = None if snr is None else snr[keep]
    for _ in range(70):
        middle = 0.5 * (low + high)
        fits = least_share(tau, middle[:, None] - c, snr).sum(axis=1) <= 1.0
        high = np.where(fits, middle, high)
        low = np.where(fits, low, middle)
    return problem.constant_s + high.min()


def brute_force_equal_shares_s(problem):
    """Least latency over all matchings under equal shares; inf if infeasible."""
    devices, blocks = matchings(problem)
    if not devices.size:
        return np.inf
    tau = problem.full_band_upload_s[devices, blocks]
    share = 1.0 / devices.shape[1]
    rate = share
    if problem.power_limited is not None:
        snr = problem.power_limited.snr[devices]
        rate = share * np.log2(1 + snr / share) / np.log2(1 + snr)
    latency = problem.compute_s[devices, blocks] + tau / rate
    return problem.constant_s + latency.max(axis=1).min()


def random_problem(rng, num_devices, num_blocks, *, power_limited=False, mode=None):
    """Any problem at all: no structure, about a fifth of the pairs infeasible."""
    shape = (num_devices, num_blocks)
    return AllocationProblem(
        rng.exponential(size=shape) * 10 ** rng.uniform(-2, 2),
        rng.exponential(size=shape) * (rng.random(shape) < 0.95),
        rng.random(shape) < rng.choice([0.7, 0.9, 1.0]),
        constant_s=rng.choice([0.0, 0.3]),
        power_limited=(
            PowerLimitedUplink(10 ** rng.uniform(-1, 4, num_devices))
            if power_limited
            else None
        ),
        mode=mode or RoundMode(),
    )


def fleet_problem(rng, num_devices=20, num_blocks=12):
    """A round of the system model: monotone in depth, Rayleigh fading, 0 to 20 dB.

    RoBERTa-base layers of 7.1 million parameters at 16 bit over 20 MHz, batches of 16
    sequences of 64 tokens, devices of 20 to 400 GFLOP/s.
    """
    parameters = 7.1e6
    forward_flops = 2 * parameters * 16 * 64
    depth = num_blocks - np.arange(num_blocks)
    flops = forward_flops * (num_blocks + (depth - 1) + 2)
    flops_per_s = 2e10 * 20 ** rng.random(num_devices)
    snr = 10 ** rng.uniform(0, 2, num_devices) * rng.exponential(size=num_devices)
    upload_s = 16 * parameters / (20e6 * np.log2(1 + snr))
    return AllocationProblem(
        flops / flops_per_s[:, None],
        np.repeat(upload_s[:, None], num_blocks, axis=1),
    )


def all_modes(rng, num_devices, num_blocks):
    """One random mode of every kind that the sizes allow, by name."""
    some = rng.choice(num_blocks, size=rng.integers(1, num_blocks + 1), replace=False)
    wanted = rng.integers(0, 3, size=num_blocks)
    wanted[rng.integers(num_blocks)] = 1
    return {
        "default": RoundMode(),
        "blocks": RoundMode(blocks=some.tolist()),
        "two-per-block": RoundMode(devices_per_block=2),
        "per-block-counts": RoundMode(devices_per_block=wanted.tolist()),
        "all": RoundMode(participation="all"),
        "all-some-blocks": RoundMode(participation="all", blocks=some.tolist()),
    }


def any_argpartition(table, kth, axis):
    """As `numpy.argpartition`, in no order but that which it promises.

    NumPy's own sorts short columns whole on some processors.
    """
    rng = np.random.default_rng(kth)
    order = np.argsort(table, axis=axis)
    before, after = order[:kth], order[kth + 1 :]
    return np.concatenate(
        [rng.permutation(before), order[kth : kth + 1], rng.permutation(after)]
    )
