"""Channels of one's own: functions, and replays of recorded traces."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lola_flwr.build import Channel, DownlinkChannel
from lola_flwr.errors import UserError
from lola_flwr.system.channel import rates_down_bps, rates_up_bps
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.own_channel import Moment, find_channel
from lola_flwr.system.traces import Traces

PHONES = [DeviceProfile(name, 1e9, 1e9, snr_db=5.0) for name in ("b", "a")]
FIRST = Moment(1, 0.0, 0)

TRACE = """time_s,device,mbit_s
0,a,8
10,a,4
25,a,0
5,b,1.5
"""


def trace(tmp_path, text=TRACE):
    path = tmp_path / "links.csv"
    path.write_text(text)
    return str(path)


def tenfold(profiles, moment):
    """Return a rate that tells what the function was asked."""
    return [1e5 * (n + 1) * moment.server_round for n, _ in enumerate(profiles)]


def test_a_function_says_what_links_carry():
    channel = Channel(own_rates=find_channel(f"{__name__}:tenfold"))
    rates = rates_up_bps(PHONES, channel, Moment(3, 0.0, 0))
    assert rates.tolist() == [3e5, 6e5]
    # Both ways alike, whatever the other keys say.
    down = DownlinkChannel(mode="unicast", gain_db=40.0)
    both = Channel(own_rates=tenfold, downlink_channel=down)
    assert rates_down_bps(PHONES, both, Moment(3, 0.0, 0)).tolist() == [3e5, 6e5]
    # A link whose rate is known has that.
    known = DeviceProfile("c", 1e9, 1e9, uplink_bps=7e6)
    assert rates_up_bps([known, *PHONES], channel, FIRST).tolist() == [7e6, 2e5, 3e5]


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ([1e6], r"returned .*1000000.* for 2 devices"),
        ("fast", "returned 'fast' for 2 devices"),
        ([1e6, 0.0], r"0 bit/s for 'a' in round 1; a rate is from 1000 to 1e\+12"),
        ([math.nan, 1e6], "nan bit/s for 'b'"),
        ([1e6, math.inf], "inf bit/s for 'a'"),
    ],
)
def test_what_is_no_rate_is_refused(rates, said):
    with pytest.raises(UserError, match=said):
        rates_up_bps(PHONES, Channel(own_rates=lambda *_: rates), FIRST)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rayleigh", "must be 'package.module:function' or a file of traces"),
        ("no_such_package:rates", "channel='no_such_package:rates' cannot be imported"),
        (f"{__name__}:TRACE", "is not a function"),
        ("missing.csv", r"missing\.csv cannot be read: No such file"),
    ],
)
def test_channels_that_there_are_not(name, said):
    with pytest.raises(UserError, match=said):
        find_channel(name)


def test_without_a_name_it_is_that_of_the_snr():
    assert find_channel("") is None


@pytest.mark.parametrize(
    ("time_s", "rate_bps"),
    [
        *((0, 8e6), (9.99, 8e6), (10, 4e6), (24.9, 4e6), (25, 0.0), (39.9, 0.0)),
        # Its last rate holds 15 s, as the one before; then it begins anew.
        *((40, 8e6), (50, 4e6), (65, 0.0), (4000, 8e6)),
    ],
)
def test_a_trace_holds_until_the_next_sample_and_begins_anew(
    tmp_path, time_s, rate_bps
):
    traces = Traces.read(Path(trace(tmp_path)))
    assert traces.rate_bps("a", time_s) == rate_bps
    assert traces.rate_bps("b", time_s) == 1.5e6, "a single rate always holds"


def test_a_replay_goes_by_the_wireless_time_and_the_names(tmp_path):
    channel = Channel(own_rates=find_channel(trace(tmp_path)))
    rates = [rates_up_bps(PHONES, channel, Moment(1, t, 0)).tolist() for t in (0, 12)]
    assert rates == [[1.5e6, 8e6], [1.5e6, 4e6]]
    # An outage is a link that carries next to nothing: such a device is not asked.
    assert rates_up_bps(PHONES, channel, Moment(9, 30.0, 0)).tolist() == [1.5e6, 1e3]
    other = DeviceProfile("device-0000", 1e9, 1e9)
    with pytest.raises(UserError, match="no device 'device-0000'; it has 'a, b'"):
        rates_up_bps([other], channel, FIRST)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "first line must be time_s,device,mbit_s"),
        ("time,device,rate\n0,a,1\n", "first line must be time_s,device,mbit_s"),
        ("time_s,device,mbit_s\n", "has no rates"),
        (TRACE + "1,a\n", "line 6 has 2 values instead of 3"),
        (TRACE + "1,a,fast\n", "line 6: '1,a,fast' must be seconds"),
        (TRACE + "-1,a,2\n", "line 6: '-1,a,2' must be seconds"),
        (TRACE + "1,a,-2\n", "line 6: '1,a,-2' must be seconds"),
        (TRACE + "nan,a,2\n", "line 6: 'nan,a,2' must be seconds"),
        (TRACE + "1,,2\n", "line 6: '1,,2' must be seconds"),
        (TRACE + "10,a,2\n", "line 6: 'a' has two rates at 10 s"),
    ],
)
def test_files_that_are_no_traces(tmp_path, text, said):
    with pytest.raises(UserError, match=said) as raised:
        find_channel(trace(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_columns_may_be_in_any_order_and_lines_too(tmp_path):
    text = "device, mbit_s ,time_s\na,4,10\n\na,8,0\n"
    channel = Channel(own_rates=find_channel(trace(tmp_path, text)))
    (phone,) = PHONES[1:]
    assert rates_up_bps([phone], channel, Moment(1, 11.0, 0)).tolist() == [4e6]
    assert rates_up_bps([phone], channel, FIRST).tolist() == [8e6]
