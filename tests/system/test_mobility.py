"""Devices that move: where they are, and what their links are worth there."""

from __future__ import annotations

import numpy as np
import pytest

from lola_flwr.build import Channel
from lola_flwr.errors import UserError
from lola_flwr.system.channel import rates_down_bps, rates_up_bps, receive_snr
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.mobility import Mobility, mobility_of
from lola_flwr.system.own_channel import Moment

MANY = [f"d{index}" for index in range(3000)]
CELL_M = 400.0


def at(time_s, *, seed=0, server_round=1):
    return Moment(server_round, time_s, seed)


@pytest.mark.parametrize("time_s", [0.0, 300.0, 1e5])
def test_devices_are_anywhere_in_the_cell_at_any_time(time_s):
    distance_m = Mobility(cell_m=CELL_M).distance_m(MANY, at(time_s))
    assert distance_m.min() >= 10.0
    assert distance_m.max() <= CELL_M / np.sqrt(2)
    # Within 100 m of the centre: that part of the area; standard error 0.008.
    within = np.pi * 100.0**2 / CELL_M**2
    assert np.mean(distance_m <= 100.0) == pytest.approx(within, abs=0.03)


def test_a_profile_states_the_mean_in_db_over_the_cell():
    gain_db = Mobility(exponent=2.0).gain_db(MANY, at(50.0))
    # Deviation 5 dB over 3000 devices: a standard error of 0.1.
    assert gain_db.mean() == pytest.approx(0.0, abs=0.4)
    steeper_db = Mobility(exponent=4.0).gain_db(MANY, at(50.0))
    np.testing.assert_allclose(steeper_db, 2 * gain_db)


def test_nobody_moves_faster_than_at_its_speed():
    moving = Mobility(speed_m_s=2.0, cell_m=CELL_M)
    one, other = (moving.distance_m(MANY, at(t)) for t in (1000.0, 1003.0))
    assert 5.5 < np.abs(one - other).max() <= 6.0 + 1e-9
    still = Mobility(speed_m_s=0.0, cell_m=CELL_M)
    np.testing.assert_array_equal(
        still.distance_m(MANY, at(0.0)), still.distance_m(MANY, at(1e6))
    )


def test_a_way_is_straight_but_at_the_border():
    moving = Mobility(speed_m_s=1.0, cell_m=CELL_M)
    times_s = np.arange(0.0, 40.0)
    squares = np.array([moving.distance_m(["a"], at(t))[0] for t in times_s]) ** 2
    # Of a straight way the square of the distance is v^2 t^2 + b t + c.
    np.testing.assert_allclose(np.diff(squares, 2), 2.0, rtol=1e-6)


def test_places_depend_on_seed_time_and_name_only():
    moving = Mobility()
    both = moving.distance_m(["a", "b"], at(70.0))
    np.testing.assert_array_equal(moving.distance_m(["b"], at(70.0)), both[1:])
    again = moving.distance_m(["b"], at(70.0, server_round=9))
    np.testing.assert_array_equal(again, both[1:])
    assert moving.distance_m(["b"], at(71.0)) != both[1]
    assert moving.distance_m(["b"], at(70.0, seed=1)) != both[1]


def test_links_carry_what_they_do_at_that_distance():
    phone = DeviceProfile("a", 1e9, 1e9, snr_db=5.0)
    linked = DeviceProfile("b", 1e9, 1e9, uplink_bps=3e6)
    channel = Channel(bandwidth_hz=1e6, fading="none", mobility=Mobility())
    moment = at(600.0)
    (gain_db, _) = Mobility().gain_db(["a", "b"], moment)
    snr = 10 ** ((5.0 + gain_db) / 10)
    assert receive_snr([phone], channel, moment) == pytest.approx([snr])
    up_bps = rates_up_bps([phone, linked], channel, moment)
    assert up_bps == pytest.approx([1e6 * np.log2(1 + snr), 3e6])
    # Down, at 10 dB more over 20 MHz.
    down_bps = rates_down_bps([phone, linked], channel, moment)
    assert down_bps == pytest.approx([20e6 * np.log2(1 + 10 * snr), 3e6])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speed_m_s": -1.0}, "speed_m_s=-1.0 of the mobility must be a number from 0"),
        ({"cell_m": 39}, "cell_m=39 of the mobility must be a number from 40 to"),
        ({"exponent": float("nan")}, "exponent=nan of the mobility"),
        ({"exponent": "3"}, "exponent='3' of the mobility"),
        ({"speed": 2.0}, "mobility has no 'speed'; it has speed_m_s, cell_m, exponent"),
    ],
)
def test_what_is_no_mobility_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        mobility_of(options)


def test_nothing_said_is_nobody_moving():
    assert mobility_of({}) is None
    assert mobility_of({"cell_m": 800}) == Mobility(cell_m=800)
