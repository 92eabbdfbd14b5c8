from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.testbed.measurement import outcome, read_samples
from simulations.testbed.traffic import bursts


def counter(times, uploads, *, noise_bps=2000.0):
    """Bytes received by each time, of uploads as (start, seconds, bytes)."""
    received = np.asarray(times) * noise_bps / 8
    for start, seconds, count in uploads:
        received = received + count * np.clip((times - start) / seconds, 0, 1)
    return [int(value) for value in received]


@given(
    rate_bps=st.floats(5e5, 1e8),
    seconds=st.floats(2, 40),
    pause_s=st.floats(6, 30),
    count=st.integers(1, 4),
)
def test_uploads_are_found_in_a_counter(rate_bps, seconds, pause_s, count):
    period = seconds + pause_s
    times = np.arange(0, count * period + 10, 0.1)
    size = rate_bps * seconds / 8
    uploads = [(5 + index * period, seconds, size) for index in range(count)]
    found = bursts(times, counter(times, uploads), smallest_bytes=0.8 * size)
    assert len(found) == count
    for burst, (start, _, _) in zip(found, uploads, strict=True):
        assert burst.start_s == pytest.approx(start, abs=0.21)
        assert burst.end_s - burst.start_s == pytest.approx(seconds, abs=0.31)
        assert burst.received_bytes == pytest.approx(size, rel=0.05)


def test_uploads_that_follow_at_once_are_told_apart_where_their_number_is_known():
    times = np.arange(0, 40, 0.1)
    received = counter(times, [(5, 10, 1e7), (17.5, 10, 1e7)])
    assert len(bursts(times, received, smallest_bytes=8e6)) == 1
    first, second = bursts(times, received, smallest_bytes=8e6, fewest=2)
    assert first.end_s == pytest.approx(15, abs=0.21)
    assert second.start_s == pytest.approx(17.5, abs=0.21)


def test_small_traffic_is_no_upload():
    times = np.arange(0, 60, 0.1)
    assert bursts(times, counter(times, []), smallest_bytes=1e5) == []
    pulls = counter(times, [(t, 0.2, 3e4) for t in range(0, 60, 3)])
    assert bursts(times, pulls, smallest_bytes=1e6) == []


def test_a_cut_off_line_of_the_log_is_left_out():
    times, received = read_samples("1.0 5 6\n1.1 7 8\n1.2 9")
    assert times == [1.0, 1.1]
    assert received == [[5, 7], [6, 8]]


def record(server_round, devices):
    return {
        "server_round": server_round,
        "round_s": 10.0,
        "blocks": [
            {
                "device": f"device-{index:04d}",
                "share": 0.5,
                "status": status,
                "upload_s": 10.0,
                "measured_upload_s": 10.0,
                "measured_downlink_s": 3.0 + index,
                "reported_compute_s": None if server_round == 1 else 2.0,
            }
            for index, status in devices
        ],
    }


def test_bursts_are_matched_with_rounds_in_order(tmp_path):
    times = np.arange(0, 60, 0.1)
    received = [
        counter(times, [(5, 10, 1e7), (35, 8, 1e7)]),
        counter(times, [(36, 12, 1e7)]),
    ]
    rounds = tmp_path / "rounds.jsonl"
    records = [
        record(1, [(0, "accepted"), (1, "no reply")]),
        record(2, [(0, "accepted"), (1, "accepted")]),
    ]
    rounds.write_text("".join(json.dumps(r) + "\n" for r in records))
    result = outcome("exact", rounds, (times, received), 1e7)
    wire = [(u.server_round, u.device, round(u.wire_s)) for u in result.uploads]
    assert wire == [
        (1, "device-0000", 10),
        (2, "device-0000", 8),
        (2, "device-0001", 12),
    ]
    assert result.uploads[1].error == pytest.approx(0.25, abs=0.05)
    assert result.wall_s == {2: pytest.approx(48 - 15, abs=0.3)}
    assert result.median_round_error == pytest.approx(10 / 33 - 1, abs=0.05)
    (parts,) = result.parts.values()
    assert (parts.downlink_s, parts.compute_s, parts.upload_s) == (4.0, 2.0, 10.0)
    assert parts.server_s == pytest.approx(33 - 16, abs=0.3)
    rounds.write_text(json.dumps(record(3, [(1, "accepted"), (1, "accepted")])) + "\n")
    with pytest.raises(ValueError, match="no upload of device-0001 in round 3"):
        outcome("exact", rounds, (times, received), 1e7)
