import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lola_flwr.allocation import AllocationProblem, PowerLimitedUplink, RoundMode
from lola_flwr.allocation.band import least_share, upload_s
from lola_flwr.allocation.shares import (
    best_deadline,
    best_shares,
    with_best_shares,
    with_equal_shares,
)

times = st.one_of(
    st.sampled_from([0.0, 1e-9, 1.0, 1e9]), st.floats(1e-9, 1e9, allow_nan=False)
)
matched = st.lists(st.tuples(times, times), min_size=1, max_size=12)


def test_hand_worked_pair():
    # 1/(T-1) + 2/(T-2) = 1  <=>  T**2 - 6T + 6 = 0, the larger root 3 + sqrt(3).
    c, tau = np.array([1.0, 2.0]), np.array([1.0, 2.0])
    deadline = 3 + np.sqrt(3)
    assert best_deadline(c, tau) == pytest.approx(deadline, rel=1e-14)
    assert best_shares(c, tau) == pytest.approx(tau / (deadline - c), rel=1e-12)


def test_equal_devices_share_equally():
    share = best_shares(np.full(7, 3.0), np.full(7, 2.0))
    assert share == pytest.approx(np.full(7, 1 / 7))


def test_slow_computers_get_more_bandwidth():
    # Remark 1 of the paper, bandwidth compensation.
    share = best_shares(np.array([1.0, 5.0, 3.0]), np.ones(3))
    assert share[1] > share[2] > share[0]


@settings(derandomize=True, max_examples=300, deadline=None)
@given(matched)
def test_all_finish_together_within_the_band(pairs):
    c, tau = np.array(pairs).T
    share = best_shares(c, tau)
    assert np.all(share >= 0) and share.sum() <= 1.0
    assert np.all(share[tau == 0] == 0)
    finish = c + upload_s(tau, share)
    deadline = best_deadline(c, tau)
    assert finish.max() == pytest.approx(deadline, rel=1e-12)
    # Optimal: the band is used up (nobody could finish earlier without another
    # finishing later), unless a device with nothing to send ends the round.
    if finish.max() > c[tau == 0].max(initial=-1.0) * (1 + 1e-9):
        assert share.sum() == pytest.approx(1.0, rel=1e-12)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(matched, st.integers(-30, 60))
def test_power_limited_devices_finish_together_too(pairs, snr_db):
    c, tau = np.array(pairs).T
    snr = np.full(c.size, 10 ** (snr_db / 10))
    share = best_shares(c, tau, snr)
    assert np.all(share >= 0) and share.sum() <= 1.0
    finish = (c + upload_s(tau, share, snr)).max()
    assert finish == pytest.approx(best_deadline(c, tau, snr), rel=1e-9)
    if finish > c[tau == 0].max(initial=-1.0) * (1 + 1e-9):
        assert share.sum() == pytest.approx(1.0, rel=1e-6)
    # A narrow band is never slower when the power is concentrated on it.
    assert finish <= best_deadline(c, tau) * (1 + 1e-12)


@pytest.mark.parametrize("snr_db", [-90, -60, -30, 0, 60])
def test_power_limited_devices_finish_together_at_vanishing_snr(snr_db):
    # There a wait that is short by rounding needs far more than the band.
    rng = np.random.default_rng(71)
    for _ in range(40):
        num_devices = rng.integers(2, 6)
        c = rng.choice([0.0, 1.0, 2.0, 3.0], num_devices)
        tau = rng.choice([0.5, 1.0, 2.0, 3.0], num_devices)
        snr = 10 ** (snr_db / 10) * 10 ** rng.uniform(0, 2, num_devices)
        deadline = best_deadline(c, tau, snr)
        assert least_share(tau, deadline - c, snr).sum() <= 1 + 1e-6
        finish = c + upload_s(tau, best_shares(c, tau, snr), snr)
        assert finish.max() == pytest.approx(deadline, rel=1e-12)


COMPUTE_S = np.array([[5.0, 4.0, 3.0], [9.0, 8.0, 7.0], [3.0, 2.0, 1.0], [2.0, 2.0, 2]])
UPLOAD_S = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [1.0, 0.0, 1]])


@pytest.mark.parametrize("snr", [None, np.array([0.5, 2.0, 30.0, 4.0])])
@pytest.mark.parametrize("split", [with_best_shares, with_equal_shares])
def test_allocations_of_a_matching_are_those_of_its_devices(split, snr):
    problem = AllocationProblem(
        COMPUTE_S,
        UPLOAD_S,
        constant_s=0.25,
        power_limited=None if snr is None else PowerLimitedUplink(snr),
        mode=RoundMode(blocks=[0, 2]),
    )
    devices, blocks = np.array([2, 0]), np.array([0, 2])
    found = split(
        problem, devices, blocks, bound_s=1.5, iterations=7, stop_reason="gap"
    )
    found.check(problem)
    assert found.block_of_device.tolist() == [2, -1, 0, -1]
    c, tau = np.array([3.0, 3.0]), np.array([7.0, 3.0])
    own = None if snr is None else snr[devices]
    share = best_shares(c, tau, own) if split is with_best_shares else np.full(2, 0.5)
    assert found.share == pytest.approx([share[1], 0.0, share[0], 0.0], rel=1e-12)
    assert found.share.sum() <= 1.0
    finish = (c + upload_s(tau, share, own)).max()
    assert found.round_s == pytest.approx(0.25 + finish, rel=1e-12)
    assert (found.num_blocks, found.bound_s) == (3, 1.5)
    assert (found.iterations, found.stop_reason) == (7, "gap")
