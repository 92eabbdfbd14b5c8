from __future__ import annotations

import numpy as np
import pytest

from lola_flwr.system.channel import db_to_linear, full_band_rate_bps, rayleigh_snr


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


def test_power_gain_is_exponential_with_mean_one():
    names = [f"d{index}" for index in range(4000)]
    gain = rayleigh_snr(np.zeros(4000), names, server_round=1, seed=3)
    # Mean and variance of Exp(1) are 1; standard errors are 1/63 and about 2.8/63.
    assert gain.mean() == pytest.approx(1.0, abs=0.07)
    assert gain.var() == pytest.approx(1.0, abs=0.2)
    assert np.quantile(gain, 0.5) == pytest.approx(np.log(2), abs=0.06)


def test_draws_depend_on_seed_round_and_name_only():
    def draw(names, server_round=1, seed=0):
        return rayleigh_snr(
            np.full(len(names), 10.0), names, server_round=server_round, seed=seed
        )

    both = draw(["a", "b"])
    np.testing.assert_array_equal(draw(["b"]), both[1:])
    assert both[0] != both[1]
    assert draw(["a"], server_round=2)[0] != both[0]
    assert draw(["a"], seed=1)[0] != both[0]
