import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import lambertw

from lola_flwr.allocation.band import PowerLimitedUplink, least_share, upload_s


def test_whole_band_takes_the_full_band_time():
    snr = np.array([1e-3, 1.0, 1e6])
    assert upload_s(np.full(3, 2.0), 1.0) == pytest.approx(2.0)
    assert upload_s(np.full(3, 2.0), 1.0, snr) == pytest.approx(2.0)


def test_nothing_to_send_takes_no_time_and_no_band_forever():
    assert upload_s(np.array([0.0, 1.0]), 0.0).tolist() == [0.0, np.inf]
    snr = np.array([2.0, 2.0])
    assert upload_s(np.array([0.0, 1.0]), 0.0, snr).tolist() == [0.0, np.inf]


def test_least_share_is_capped_where_the_band_does_not_do():
    tau = np.array([1.0, 1.0, 1.0, 0.0])
    left = np.array([0.5, 0.0, -1.0, 1.0])
    for snr in (None, np.full(4, 3.0)):
        assert least_share(tau, left, snr).tolist() == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("snr_db", [-30, -10, 0, 10, 30, 60])
@pytest.mark.parametrize("rate", [1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999])
def test_least_share_inverts_the_upload_time(snr_db, rate):
    snr = np.array([10 ** (snr_db / 10)])
    share = least_share(np.array([rate]), np.ones(1), snr)
    assert upload_s(np.array([rate]), share, snr) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("snr", [1.0, 30.0, 1e6])
@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.5, 0.9])
def test_least_share_is_lamberts_function(snr, rate):
    # rho = snr / x, x = -W_{-1}(-a exp(-a)) / a - 1, a = rate * log(1+snr) / snr
    a = rate * np.log1p(snr) / snr
    x = -lambertw(-a * np.exp(-a), k=-1).real / a - 1
    share = least_share(np.array([rate]), np.ones(1), np.array([snr]))
    assert share == pytest.approx(snr / x, rel=1e-9)


@pytest.mark.parametrize("snr", [1e-3, 1.0, 1e6])
def test_least_share_is_the_root_of_the_rate(snr):
    def surplus(rho):
        return rho * np.log2(1 + snr / rho) / np.log2(1 + snr) - 0.4

    root = brentq(surplus, 1e-9, 1.0, xtol=1e-15)
    share = least_share(np.array([0.4]), np.ones(1), np.array([snr]))
    assert share == pytest.approx(root, rel=1e-9)


@pytest.mark.parametrize("e", [6e-9, 8e-9, 1e-8, 2e-8])
def test_least_share_at_vanishing_snr(e):
    # a = rate * log(1+snr) / snr = 1 - e, and log(1+x) / x = 1 - e gives x = 2 e to
    # first order: rho = snr / x.
    snr = 1e-9
    rate = (1 - e) / (1 - snr / 2)
    share = least_share(np.array([rate]), np.ones(1), np.array([snr]))
    assert share == pytest.approx(snr / (2 * e), rel=1e-6)


def test_least_share_rises_with_the_rate_and_stays_below_it():
    # From the smallest signal to the largest, and up to the last rate below 1, where
    # numerator and denominator of Newton's step both vanish.
    snr = 2.0 ** np.arange(-900, 300, 4)[:, np.newaxis]
    few = 2.0 ** -np.arange(1, 54)
    rate = np.concatenate([few[::-1], 1 - few[1:]])
    share = least_share(np.broadcast_to(rate, (snr.size, rate.size)), np.ones(1), snr)
    assert np.all((share > 0) & (share <= rate * (1 + 1e-12)))
    assert np.all(np.diff(share, axis=1) >= -1e-12 * share[:, 1:])


def test_least_share_where_rounding_hides_the_signal():
    # Newton's step is 0 / 0: no warning, and a share that is enough, 0.58 or more.
    snr, rate = np.array([3.0929939537108197e-16]), np.array([1 - 2.0**-53])
    assert 0.57 < least_share(rate, np.ones(1), snr)[0] <= 1


def test_times_and_shares_beyond_all_numbers():
    # Neither a warning nor a NaN: too long is infinite, too much is the whole band.
    huge, tiny = np.array([1e300]), np.array([1e-300])
    for snr in (None, np.array([3.0])):
        assert upload_s(huge, tiny, snr).tolist() == [np.inf]
        assert least_share(huge, tiny, snr).tolist() == [1.0]
        nothing = np.zeros(1)
        assert least_share(nothing, nothing, snr).tolist() == [1.0]
    assert least_share(tiny, np.ones(1), np.array([3.0]))[0] < 1e-290


def test_no_signal_is_no_gain_from_a_narrow_band():
    share = least_share(np.full(2, 0.4), np.ones(2), np.array([0.0, 1.0]))
    assert share[0] == 0.4
    assert share[1] < 0.4


def test_single_precision_goes_in_and_double_comes_out():
    tau, share = np.float32([1.0, 3.0]), np.float32([0.1, 0.7])
    expected = tau.astype(np.float64) / share.astype(np.float64)
    assert upload_s(tau, share).tolist() == expected.tolist()


def test_snrs_are_copied_and_frozen():
    given = np.array([0, 1, 7])
    uplink = PowerLimitedUplink(given)
    given[:] = 9
    assert uplink.snr.tolist() == [0.0, 1.0, 7.0]
    assert uplink.snr.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        uplink.snr[0] = 2
    assert PowerLimitedUplink([0.25]).snr.tolist() == [0.25]


@pytest.mark.parametrize(
    ("snr", "message"),
    [
        ([1.0, -1.0], r"snr\[1\]=-1.0"),
        ([np.nan, 1.0], r"snr\[0\]=nan"),
        ([1.0, np.inf], r"snr\[1\]=inf"),
        (3.0, r"snr must be \(K,\)"),
        ([[1.0, 2.0]], r"snr must be \(K,\)"),
    ],
)
def test_impossible_snr_is_refused(snr, message):
    with pytest.raises(ValueError, match=message):
        PowerLimitedUplink(snr)
