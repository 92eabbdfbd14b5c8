"""Links whose rate is known: what the coordinator plans, sends and learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.system.devices import simulated_device
from tests.server.coordinators import honest_reply, make_coordinator

RATES_BPS = {"id-0": 4e5, "id-1": 2e5, "id-2": 1e5}


def coordinator_with_links(**options):
    coordinator = make_coordinator(num_devices=0, **options)
    for index, (device, rate_bps) in enumerate(RATES_BPS.items()):
        profile = replace(simulated_device(index, seed=1), uplink_bps=rate_bps)
        coordinator.add_device(device, profile.to_properties())
    return coordinator


def replies(plan, factor, limit, slow=RATES_BPS):
    """Uploads, those of some devices ``factor`` times as long as planned."""
    rows = {device: row for row, device in enumerate(plan.device_ids)}
    upload_s = plan.allocation.upload_s(plan.problem)
    for device in plan.assignments:
        reply = honest_reply(plan, device)
        report = dict(reply.report)
        if limit is not None:
            report["uplink-limit"] = limit
        seconds = float((factor if device in slow else 1) * upload_s[rows[device]])
        yield replace(reply, report=report, upload_s=seconds)


def test_an_assignment_says_what_its_share_of_the_link_is():
    coordinator = coordinator_with_links()
    plan = coordinator.plan_round(1, RATES_BPS)
    assert len(plan.assignments) == 3
    for device, assignment in plan.assignments.items():
        expected = assignment.share * RATES_BPS[device]
        assert assignment.uplink_bps == pytest.approx(expected)
    # No fading: the same links in every round.
    again = coordinator.plan_round(2, RATES_BPS)
    np.testing.assert_array_equal(
        again.problem.full_band_upload_s, plan.problem.full_band_upload_s
    )


def test_without_a_known_link_nothing_is_limited():
    plan = make_coordinator().plan_round(1, ["id-0", "id-1", "id-2"])
    for assignment in plan.assignments.values():
        assert assignment.uplink_bps is None
        assert "uplink-bps" not in assignment.to_record()


def test_measured_uploads_are_recorded_and_learned_from():
    coordinator = coordinator_with_links()
    plan = coordinator.plan_round(1, RATES_BPS)
    late = replies(plan, 400.0, "pacing", slow=["id-1"])
    record = coordinator.complete_round(plan, late)
    slow = sum(b.measured_upload_s > 300 * b.upload_s for b in record.blocks)
    assert slow == 1
    assert {block.uplink_limit for block in record.blocks} == {"pacing"}
    assert record.observed_s > 10 * record.round_s
    text = "\n".join(record.lines())
    assert "s measured, share is pacing)" in text
    row = plan.device_ids.index("id-1")
    later = coordinator.plan_round(2, RATES_BPS)
    ratio = later.problem.full_band_upload_s / plan.problem.full_band_upload_s
    assert np.all(ratio[row] > 10)
    assert np.all(np.delete(ratio, row, axis=0) == 1)


def test_a_run_that_does_not_correct_profiles_keeps_the_stated_rates():
    coordinator = coordinator_with_links(correct_profiles=False)
    plan = coordinator.plan_round(1, RATES_BPS)
    record = coordinator.complete_round(plan, replies(plan, 4.0, None))
    assert "share is advice" in "\n".join(record.lines())
    later = coordinator.plan_round(2, RATES_BPS)
    np.testing.assert_array_equal(
        later.problem.full_band_upload_s, plan.problem.full_band_upload_s
    )


def test_an_unknown_limit_is_refused():
    coordinator = coordinator_with_links()
    plan = coordinator.plan_round(1, RATES_BPS)
    record = coordinator.complete_round(plan, replies(plan, 1.0, "magic"))
    assert record.refused == {"malformed-report": 3}
