"""Check what a device says about its update, which is never trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lola_flwr.errors import quoted
from lola_flwr.server.received import UpdateRefused
from lola_flwr.wire.records import (
    FAILURE_DETAIL_KEY,
    FAILURE_KEY,
    OUT_OF_MEMORY,
    SQUARES_TYPE,
    Assignment,
    MalformedRecord,
    UpdateReport,
)

# Kinds of updates of devices that train the weights themselves.
TRAINED_KINDS = ("weights", "moves")

# Beyond these a device's report is not believed: no mini-batch takes a day, and no loss
# that can still be trained on is this large.
_LONGEST_COMPUTE_S = 86_400.0
_LARGEST_LOSS = 1e6
_LARGEST_PEAK_BYTES = 1e15
_LARGEST_SQUARE = 1e18
_LARGEST_COMPUTE_J = 1e9


def checked_report(
    assignment: Assignment, record: Mapping[str, object], *, takes_weights: bool
) -> UpdateReport:
    """Return a device's report; for one that gives none, what goes unsaid.

    Parameters
    ----------
    assignment
        What the device was asked for.
    record
        What it says.
    takes_weights
        Whether devices may return weights, or how far they moved.

    Raises
    ------
    UpdateRefused
        It says that there is no update, or what cannot be.
    """
    if FAILURE_KEY in record:
        raise _failure(record)
    if "update-kind" not in record:
        return UpdateReport(
            server_round=assignment.server_round,
            block_index=assignment.block_index,
            update_kind="weights",
            loss=None,
            compute_s=None,
            compute_clock="",
        )
    try:
        report = UpdateReport.from_record(record)
    except MalformedRecord as error:
        raise UpdateRefused("malformed-report", str(error)) from None
    if report.server_round != assignment.server_round:
        raise UpdateRefused("late", f"answers round {report.server_round}")
    if report.block_index != assignment.block_index:
        raise UpdateRefused("wrong-block", f"is for block {report.block_index}")
    estimates = assignment.direction_seed is not None
    trained = TRAINED_KINDS if takes_weights else ()
    kinds = ["zeroth-order"] if estimates else ["gradient", *trained]
    if report.update_kind not in (*kinds, "nothing"):
        raise UpdateRefused("wrong-kind", f"holds {quoted(report.update_kind)}")
    if report.update_kind == "zeroth-order" and (
        report.direction_seed != assignment.direction_seed
    ):
        raise UpdateRefused(
            "wrong-seed", f"is about the directions of seed {report.direction_seed}"
        )
    if report.compute_clock not in ("", "measured", "simulated"):
        clock = quoted(report.compute_clock)
        raise UpdateRefused("malformed-report", f"compute-clock={clock}")
    if report.uplink_limit not in (None, "pacing", "tc"):
        limit = quoted(report.uplink_limit)
        raise UpdateRefused("malformed-report", f"uplink-limit={limit}")
    compute_s, loss = report.compute_s, report.loss
    if compute_s is not None and not 0 <= compute_s <= _LONGEST_COMPUTE_S:
        raise UpdateRefused("implausible", f"compute_s={compute_s:g}")
    if loss is not None and not abs(loss) <= _LARGEST_LOSS:
        raise UpdateRefused("implausible", f"loss={loss:g}")
    peak_bytes = report.peak_memory_bytes
    if peak_bytes is not None and not 0 <= peak_bytes <= _LARGEST_PEAK_BYTES:
        raise UpdateRefused("implausible", f"peak_memory_bytes={peak_bytes:g}")
    joules = report.compute_j
    if joules is not None and not 0 <= joules <= _LARGEST_COMPUTE_J:
        raise UpdateRefused("implausible", f"compute_j={joules:g}")
    return _with_checked_squares(report, assignment)


def _with_checked_squares(report: UpdateReport, assignment: Assignment) -> UpdateReport:
    """Return a report without the squares that nobody asked for; check the others."""
    few, most = report.few_examples, report.all_examples
    squares = report.few_square, report.all_square
    if not assignment.measures_noise or None in (few, most, *squares):
        return replace(
            report,
            few_examples=None,
            few_square=None,
            all_examples=None,
            all_square=None,
            further_squares=None,
        )
    if not (few and most and 1 <= few < most <= assignment.batch_size):
        raise UpdateRefused("implausible", f"squares over {few} of {most} examples")
    further = report.further_squares or b""
    expected_bytes = 2 * (len(assignment.blocks) - 1) * SQUARES_TYPE.itemsize
    if len(further) not in (0, expected_bytes):
        raise UpdateRefused(
            "malformed-report",
            f"{len(further)} bytes of further squares, not {expected_bytes}",
        )
    for square in (*squares, *np.frombuffer(further, SQUARES_TYPE)):
        if not (square is not None and 0 <= square <= _LARGEST_SQUARE):
            raise UpdateRefused("implausible", f"a squared norm of {square:g}")
    return report


def _failure(record: Mapping[str, object]) -> UpdateRefused:
    """Return what a device says that kept it from training."""
    kind = record[FAILURE_KEY]
    reason = kind if kind == OUT_OF_MEMORY else "device-failure"
    return UpdateRefused(str(reason), quoted(record.get(FAILURE_DETAIL_KEY, kind)))
