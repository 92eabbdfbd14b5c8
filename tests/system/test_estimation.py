from __future__ import annotations

import numpy as np
import pytest

from lola_flwr.system.estimation import ComputeEstimate, Observation

CLAIMED_S = np.array([[3.0, 2.0, 1.0], [6.0, 4.0, 2.0], [3.0, 2.0, 1.0]])  # [K, N]
DEVICES = ["a", "b", "c"]


def observe(estimate, true_s, matching):
    return estimate.update(
        [Observation(DEVICES[k], n, CLAIMED_S[k, n], true_s[k, n]) for k, n in matching]
    )


def test_nothing_observed_changes_nothing():
    estimate = ComputeEstimate().update([])
    np.testing.assert_array_equal(estimate.correct(CLAIMED_S, DEVICES), CLAIMED_S)


def test_a_slower_device_is_found_in_every_block():
    true_s = CLAIMED_S * np.array([1.0, 4.0, 1.0])[:, None]
    estimate = ComputeEstimate()
    for _ in range(6):
        estimate = observe(estimate, true_s, [(0, 0), (1, 1), (2, 2)])
    np.testing.assert_allclose(estimate.correct(CLAIMED_S, DEVICES), true_s, rtol=0.15)


def test_a_steeper_depth_curve_is_found_from_rotating_devices():
    true_s = CLAIMED_S * np.array([2.0, 1.0, 0.5])[None, :]
    estimate = ComputeEstimate()
    for turn in range(150):
        matching = [((turn + n) % 3, n) for n in range(3)]
        estimate = observe(estimate, true_s, matching)
    corrected = estimate.correct(CLAIMED_S, DEVICES)
    before = np.abs(np.log(CLAIMED_S / true_s)).mean()
    assert np.abs(np.log(corrected / true_s)).mean() < before / 2


@pytest.mark.parametrize("observed_s", [0.0, -1.0, 1e300])
def test_nonsense_stays_bounded(observed_s):
    estimate = ComputeEstimate()
    for _ in range(50):
        estimate = estimate.update([Observation("a", 0, 1.0, observed_s)])
    corrected = estimate.correct(CLAIMED_S, DEVICES)
    assert np.all(np.isfinite(corrected))
    assert np.all(corrected > 0)
    assert corrected[0, 0] <= 3.0 * 1e3 * 1.01 * 1e3
    np.testing.assert_array_equal(corrected[1, 1:], CLAIMED_S[1, 1:])
