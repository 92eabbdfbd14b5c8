from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.wire.records import Assignment, MalformedRecord, UpdateReport

SCALARS = st.one_of(
    st.booleans(), st.binary(), st.floats(), st.integers(), st.text(), st.none()
)
REPORT = UpdateReport(
    server_round=3,
    block_index=1,
    update_kind="gradient",
    loss=0.5,
    compute_s=1.25,
    compute_clock="measured",
)


def test_keys_on_the_wire():
    assignment = Assignment(
        server_round=1,
        block_index=2,
        share=0.25,
        batch_size=32,
        codec="fp32",
        base_fingerprint="ab",
    )
    record = assignment.to_record()
    assert record == {
        "server-round": 1,
        "block-index": 2,
        "share": 0.25,
        "batch-size": 32,
        "codec": "fp32",
        "base-fingerprint": "ab",
        "sends-head": True,
        "trains-all": False,
    }
    assert Assignment.from_record({**record, "user-key": 7}) == assignment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block-index": "1"}, "block-index='1' must be of type int"),
        ({"block-index": True}, "block-index=True must be of type int"),
        ({"loss": float("nan")}, "loss=nan must be finite"),
        ({"loss": None}, "loss=None must be of type float"),
    ],
)
def test_malformed_reports(change, message):
    with pytest.raises(MalformedRecord, match=message):
        UpdateReport.from_record({**REPORT.to_record(), **change})


def test_integral_float():
    report = UpdateReport.from_record({**REPORT.to_record(), "compute-s": 2})
    assert report.compute_s == 2.0
    assert isinstance(report.compute_s, float)


@given(
    st.dictionaries(st.sampled_from(sorted(REPORT.to_record())) | st.text(), SCALARS)
)
def test_any_record_gives_a_report_or_the_one_error(record):
    try:
        report = UpdateReport.from_record(record)
    except MalformedRecord:
        return
    assert report.to_record().items() <= record.items()


def test_what_a_device_does_not_know_is_left_out():
    report = replace(REPORT, loss=None, compute_s=None)
    record = report.to_record()
    assert "loss" not in record
    assert "compute-s" not in record
    assert UpdateReport.from_record(record) == report
