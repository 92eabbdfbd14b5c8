from __future__ import annotations

import numpy as np

from lola_flwr.system.channel import db_to_linear, full_band_rate_bps


def test_decibels():
    np.testing.assert_allclose(
        db_to_linear([-10, 0, 3, 20]), [0.1, 1, 1.99526, 100], 1e-5
    )


def test_rate_is_shannons():
    # 20 MHz at an SNR of 3 (linear): log2(4) = 2 bit/s/Hz.
    np.testing.assert_allclose(
        full_band_rate_bps(20e6, np.array([3.0, 0.0])), [40e6, 0]
    )


def test_deep_fade_keeps_a_positive_rate():
    assert full_band_rate_bps(1.0, np.array([1e-30]))[0] > 0
