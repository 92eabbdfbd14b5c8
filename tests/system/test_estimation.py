from __future__ import annotations

import numpy as np
import pytest

from lola_flwr.system.estimation import (
    ComputeEstimate,
    Observation,
    RateEstimate,
    RateObservation,
)

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


def test_who_was_not_seen_is_believed_to_be_like_those_that_were():
    """Where all are faster than claimed, no device is preferred for being known."""
    true_s, estimate = CLAIMED_S / 4, ComputeEstimate()
    for _ in range(6):
        estimate = observe(estimate, true_s, [(0, 0), (1, 1)])
    corrected = estimate.correct(CLAIMED_S, DEVICES)
    np.testing.assert_allclose(corrected, true_s, rtol=0.1)
    # First seen, a device is not taken for slower than it was believed to be.
    after = observe(estimate, true_s, [(2, 2)]).correct(CLAIMED_S, DEVICES)
    np.testing.assert_allclose(after[2], true_s[2], rtol=0.1)


def test_a_slow_device_does_not_slow_down_those_that_were_not_seen():
    one = observe(ComputeEstimate(), 9 * CLAIMED_S, [(0, 0)])
    np.testing.assert_array_equal(
        one.correct(CLAIMED_S, DEVICES)[1:, 1:], CLAIMED_S[1:, 1:]
    )
    true_s = CLAIMED_S * np.array([9.0, 1.0, 1.0])[:, None]
    two = observe(ComputeEstimate(), true_s, [(0, 0), (1, 1)])
    assert two.correct(CLAIMED_S, DEVICES)[2, 2] == pytest.approx(CLAIMED_S[2, 2])


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


def upload(rate_bps, *, held=True):
    """A long upload that shows a rate of the whole uplink, of which it has half."""
    upload_s = 1e9 / (rate_bps * 0.5)
    return RateObservation("a", 8e6, 1e9, upload_s, share=0.5, held=held)


def rate_after(*observations):
    estimate = RateEstimate()
    for seen in observations:
        estimate = estimate.update([seen])
    return float(estimate.correct(np.array([8e6]), ["a"])[0])


def test_a_link_that_is_slower_than_its_profile_is_found_out():
    for held, rel in ((False, 0.02), (True, 0.14)):
        uploads = [upload(2e6, held=held)] * 6
        assert rate_after(*uploads) == pytest.approx(2e6, rel=rel)


def test_a_short_upload_may_pause():
    """A handshake of 0.3 s is most of an upload of 0.1 s."""
    short = RateObservation("a", 8e6, 4e5, 0.4, share=0.5, held=True)
    assert rate_after(*[short] * 5) == 8e6


def test_an_upload_at_its_limit_does_not_lower_the_rate():
    """Headers and handshakes take a few percent: no reason to send still less."""
    estimate = RateEstimate()
    for _ in range(50):
        believed_bps = float(estimate.correct(np.array([8e6]), ["a"])[0])
        estimate = estimate.update([upload(0.93 * believed_bps)])
    assert float(estimate.correct(np.array([8e6]), ["a"])[0]) == 8e6


def test_a_limited_link_that_recovers_is_believed_again_up_to_its_profile():
    estimate = RateEstimate()
    for _ in range(5):
        estimate = estimate.update([upload(2e6)])
    believed = []
    for _ in range(30):
        believed_bps = float(estimate.correct(np.array([8e6]), ["a"])[0])
        believed.append(believed_bps)
        estimate = estimate.update([upload(0.97 * believed_bps)])
    assert believed == sorted(believed)
    assert believed[-1] == pytest.approx(8e6)


def test_without_a_limit_a_link_can_turn_out_faster():
    assert rate_after(*[upload(2e7, held=False)] * 6) == pytest.approx(2e7, rel=0.02)


def test_an_absurd_upload_moves_a_rate_by_a_bounded_factor():
    absurd = [upload(1e30, held=False), upload(1e-30, held=False)]
    for seen in absurd:
        rate = rate_after(*[seen] * 20)
        assert 8e3 * 0.99 <= rate <= 8e9 * 1.01
    instant = RateObservation("a", 8e6, 8e6, 0.0, 0.5, False)
    assert np.isfinite(rate_after(instant))


def test_other_devices_keep_their_rates():
    estimate = RateEstimate().update([upload(2e6)])
    np.testing.assert_array_equal(estimate.correct(np.array([5.0]), ["b"]), [5.0])


def test_what_all_limited_uploads_are_late_by_is_no_property_of_a_link():
    def late(device, upload_s):
        return RateObservation(device, 8e6, 8e7, upload_s, share=0.5, held=True)

    estimate = RateEstimate()
    for _ in range(10):
        # Planned for 20 s; the fourth link has half its rate.
        estimate = estimate.update(
            [late(d, 28.0 + i) for i, d in enumerate("abc")] + [late("d", 49.0)]
        )
    rates = estimate.correct(np.full(4, 8e6), list("abcd"))
    np.testing.assert_array_equal(rates[:3], 8e6)
    assert 4e6 * 0.9 < rates[3] < 4e6 * 1.35
