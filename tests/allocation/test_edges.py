import numpy as np
import pytest

from lola_flwr.allocation import AllocationProblem, PowerLimitedUplink, RoundMode
from lola_flwr.allocation.edges import edges_of

COMPUTE_S = np.array([[6.0, 5.0, 4.0], [3.0, np.inf, 1.0], [9.0, 8.0, 7.0], [2, 2, 2]])
UPLOAD_S = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, np.inf], [1, 0, 1]])
FEASIBLE = np.ones((4, 3), dtype=bool)
FEASIBLE[0, 1] = False
SNR = np.array([0.5, 2.0, 3.0, 0.0])


def problem(*, snr=SNR, **mode):
    return AllocationProblem(
        COMPUTE_S,
        UPLOAD_S,
        FEASIBLE,
        power_limited=None if snr is None else PowerLimitedUplink(snr),
        mode=RoundMode(**mode),
    )


def test_impossible_pairs_compute_for_ever_and_upload_in_no_time():
    edges = edges_of(problem())
    possible = FEASIBLE & np.isfinite(COMPUTE_S) & np.isfinite(UPLOAD_S)
    possible[3] = False  # no signal
    np.testing.assert_array_equal(edges.possible, possible)
    np.testing.assert_array_equal(
        edges.compute_s, np.where(possible, COMPUTE_S, np.inf)
    )
    np.testing.assert_array_equal(
        edges.full_band_upload_s, np.where(possible, UPLOAD_S, 0.0)
    )
    np.testing.assert_array_equal(edges.snr, SNR[:, np.newaxis])
    assert edges.devices.tolist() == [0, 1, 2, 3]
    assert edges.blocks.tolist() == [0, 1, 2]
    assert edges.demand.tolist() == [1, 1, 1]
    assert not edges.all_devices


@pytest.mark.parametrize(
    "devices", [slice(1, 3), slice(2, 9), slice(None), np.array([1, 3])]
)
def test_some_devices_and_some_blocks(devices):
    given = problem(devices_per_block=[2, 0, 1], participation="all")
    edges = edges_of(given, devices)
    rows = np.arange(4)[devices]
    assert edges.devices.tolist() == rows.tolist()
    assert edges.blocks.tolist() == [0, 2]
    assert edges.demand.tolist() == [2, 1]
    assert edges.all_devices
    whole = edges_of(problem())
    for name in ("compute_s", "full_band_upload_s"):
        np.testing.assert_array_equal(
            getattr(edges, name), getattr(whole, name)[rows][:, [0, 2]]
        )
    np.testing.assert_array_equal(edges.snr, SNR[rows][:, np.newaxis])


def test_where_everything_is_possible_nothing_is_copied():
    ones = np.ones((2, 2))
    given = AllocationProblem(ones, 2 * ones)
    edges = edges_of(given)
    assert np.shares_memory(edges.compute_s, given.compute_s)
    assert np.shares_memory(edges.full_band_upload_s, given.full_band_upload_s)
    assert edges.snr is None


@pytest.mark.parametrize("snr", [None, SNR])
def test_latencies_and_shares_are_each_other_s_inverse(snr):
    edges = edges_of(problem(snr=snr))
    latency_s = edges.latency_s(0.25)
    possible = edges.possible & (edges.full_band_upload_s > 0)
    np.testing.assert_array_equal(np.isinf(latency_s), ~edges.possible)
    if snr is None:
        expected = edges.compute_s + 4 * edges.full_band_upload_s
    else:
        # A quarter of the band at four times the SNR.
        column = snr[:, np.newaxis]
        with np.errstate(invalid="ignore"):
            rate = 0.25 * np.log(1 + 4 * column) / np.log(1 + column)
        expected = edges.compute_s + edges.full_band_upload_s / rate
    np.testing.assert_allclose(latency_s[possible], expected[possible])
    for device, block in np.argwhere(possible):
        share = edges.least_share(latency_s[device, block])
        assert share[device, block] == pytest.approx(0.25)
    assert np.all(edges.least_share(1e3)[~edges.possible] == 1.0)
