"""Fading: its distribution, what rounds have in common, and what draws depend on."""

from __future__ import annotations

import numpy as np
import pytest

from lola_flwr.build import Channel
from lola_flwr.errors import UserError
from lola_flwr.system.channel import receive_snr
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.fading import gauss_markov_gain, power_gain, rayleigh_gain
from lola_flwr.system.own_channel import Moment

MANY = [f"d{index}" for index in range(1500)]


def gauss_markov(time_s, names=MANY, *, coherence_s=2.0, server_round=1, seed=3):
    moment = Moment(server_round, time_s, seed)
    return gauss_markov_gain(names, moment, coherence_s=coherence_s)


@pytest.mark.parametrize(
    "gain",
    [
        lambda: rayleigh_gain(MANY, Moment(1, 0.0, 3)),
        lambda: gauss_markov(0.0),
        # Within a stretch of 64 s, after some halvings, and after all.
        lambda: gauss_markov(66.0),
        pytest.param(lambda: gauss_markov(77.77), marks=pytest.mark.slow),
    ],
)
def test_power_gain_is_exponential_with_mean_one(gain):
    drawn = gain()
    # Mean and variance of Exp(1) are 1; standard errors are 1/39 and about 2.8/39.
    assert drawn.mean() == pytest.approx(1.0, abs=0.08)
    assert drawn.var() == pytest.approx(1.0, abs=0.2)
    for part in (0.1, 0.5, 0.9):
        expected = -np.log1p(-part)
        error = np.sqrt(part / (1 - part) / len(drawn))  # of the sample's quantile
        assert np.quantile(drawn, part) == pytest.approx(expected, abs=4 * error)


def correlation(one, other):
    return float(np.corrcoef(one, other)[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("start_s", [0.0, 5.3, 62.5, 63.9, 1e6 + 17])
@pytest.mark.parametrize("lag", [0.25, 1.0, 2.0, 20.0])
def test_power_gains_correlate_by_the_time_between_them(start_s, lag):
    # The correlation of power gains is the square of that of amplitudes; its standard
    # error is below 0.03 here, and times are told apart by 1/128 of the coherence time.
    one, other = gauss_markov(start_s), gauss_markov(start_s + 2.0 * lag)
    assert correlation(one, other) == pytest.approx(np.exp(-2 * lag), abs=0.1)


def test_at_the_coherence_time_the_correlation_is_that_of_a_gauss_markov_process():
    one, other = (gauss_markov(t, MANY) for t in (0.0, 2.0))
    assert correlation(one, other) == pytest.approx(np.exp(-2), abs=0.09)


@pytest.mark.slow
def test_a_round_depends_on_the_past_by_the_last_one_alone():
    """Partial correlation over an interval is 0: first order."""
    one, two, three = (gauss_markov(t) for t in (40.0, 41.0, 42.5))
    known = correlation(one, two) * correlation(two, three)
    assert correlation(one, three) == pytest.approx(known, abs=0.05)


@pytest.mark.parametrize("draw", [rayleigh_gain, gauss_markov_gain])
def test_draws_depend_on_seed_moment_and_name_only(draw):
    def drawn(names, moment=(2, 9.0, 0)):
        options = {} if draw is rayleigh_gain else {"coherence_s": 2.0}
        return draw(names, Moment(*moment), **options)

    both = drawn(["a", "b"])
    np.testing.assert_array_equal(drawn(["b"]), both[1:])
    assert both[0] != both[1]
    assert drawn(["a"], (2, 9.0, 1))[0] != both[0]
    of_another_round = drawn(["a"], (3, 9.0, 0))[0]
    at_another_time = drawn(["a"], (2, 9.5, 0))[0]
    if draw is rayleigh_gain:
        assert of_another_round != both[0] == at_another_time
    else:
        assert at_another_time != both[0] == of_another_round


def test_without_fading_the_gain_is_one():
    moment = Moment(1, 0.0, 0)
    assert power_gain("none", ["a", "b"], moment, coherence_s=1.0).tolist() == [1, 1]
    still = Channel(fading="none")
    phone = DeviceProfile("a", 1e9, 1e9, snr_db=10.0)
    assert receive_snr([phone], still, moment, gain_db=10.0) == pytest.approx([100.0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fading": "rician"}, "fading='rician' must be one of rayleigh, none, gauss-"),
        ({"fading": False}, "fading=False must be one of"),
        ({"uplink": "cdma"}, "uplink='cdma' must be one of ofdma, power-limited"),
        ({"coherence_s": 0.0}, "coherence_s=0.0 must be positive"),
        ({"coherence_s": float("nan")}, "coherence_s=nan must be positive"),
    ],
)
def test_what_there_is_not_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        Channel(**options)


@pytest.mark.parametrize("option", [{"fading": "none"}, {"uplink": "power-limited"}])
def test_rates_of_ones_own_take_the_place_of_the_snr(option):
    with pytest.raises(
        UserError, match=r"\(own_rates\) says what links carry; drop one"
    ):
        Channel(own_rates=lambda *_: [1e6], **option)
