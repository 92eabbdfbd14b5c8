"""Sum a round up for the log, from its plan and from what the devices replied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lola_flwr.allocation.in_turn import round_in_turn_s
from lola_flwr.planning import RunStatement, planned_blocks
from lola_flwr.run.records import BlockRecord, RoundRecord, added
from lola_flwr.server.round.intake import RoundReplies
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.wire.payload import SizesDown


def round_record(
    plan: RoundPlan,
    replies: RoundReplies,
    run: RunStatement,
    *,
    sizes_down: SizesDown,
    wireless_s: float,
    joules: float | None,
) -> RoundRecord:
    """Return the record of a round.

    Parameters
    ----------
    plan
        What was asked of whom.
    replies
        What became of it.
    run
        What the problems of the run's rounds have in common.
    sizes_down
        How large what devices are sent is.
    wireless_s, joules
        Observed latencies of the rounds before, seconds, and their energy; None where
        that is not known.
    """
    device_of = {profile.name: device for device, profile in plan.profiles.items()}
    blocks = tuple(
        _with_reply(planned, device_of[planned.device], plan, replies, sizes_down)
        for planned in planned_blocks(run, plan.solved)
    )
    observed_s = run.channel.constant_s + _last_s(run, blocks)
    losses, weights = [], []
    for accepted in replies.accepted.values():
        if accepted.report.loss is not None:
            losses.append(accepted.report.loss)
            weights.append(accepted.update.num_examples)
    record = RoundRecord(
        server_round=plan.server_round,
        num_devices=len(plan.device_ids),
        num_excluded=plan.solved.num_excluded,
        round_s=plan.allocation.round_s,
        observed_s=observed_s,
        bound_s=plan.allocation.bound_s,
        worth_gap=plan.solved.stated.worth_gap,
        wireless_s=wireless_s + observed_s,
        train_loss=float(np.average(losses, weights=weights)) if losses else None,
        refused=replies.refused,
        blocks=blocks,
    )
    return replace(record, joules=added(joules, record.round_j))


def _last_s(run: RunStatement, blocks: Sequence[BlockRecord]) -> float:
    """Return when the last device had sent: as measured, else as planned."""
    if run.channel.uplink != "tdma":
        return max(sum(_observed(block)) for block in blocks)
    wait_s, compute_s, upload_s = np.array([_observed(block) for block in blocks]).T
    return round_in_turn_s(wait_s + compute_s, upload_s)


def _observed(block: BlockRecord) -> tuple[float, float, float]:
    """Return the seconds to wait, compute and send: as measured, else as planned."""
    seen = (
        block.measured_downlink_s,
        block.reported_compute_s,
        block.measured_upload_s,
    )
    planned = (block.downlink_s, block.compute_s, block.upload_s)
    wait_s, compute_s, upload_s = (
        expected if measured is None else measured
        for measured, expected in zip(seen, planned, strict=True)
    )
    return wait_s, compute_s, upload_s


def _with_reply(
    planned: BlockRecord,
    device: str,
    plan: RoundPlan,
    replies: RoundReplies,
    sizes_down: SizesDown,
) -> BlockRecord:
    """Add to a device's part of a plan what became of it."""
    nbytes = sizes_down.nbytes(plan.manifests.get(device))
    sent = replace(planned, sent_bytes=sum(nbytes))
    accepted = replies.accepted.get(device)
    if accepted is None:
        return replace(sent, status=replies.refusals.get(device, "no reply"))
    report, upload = accepted.report, accepted.upload
    seen = replace(
        sent,
        status="accepted",
        reported_compute_s=report.compute_s,
        compute_clock=report.compute_clock,
        loss=report.loss,
        peak_memory_bytes=report.peak_memory_bytes,
        uplink_limit=report.uplink_limit,
        ignored_arrays=upload.ignored_arrays,
        measured_upload_s=upload.upload_s,
        measured_downlink_s=accepted.downlink_s,
        unexplained_s=replies.unexplained_s.get(device),
        received_bytes=int(upload.payload_bits) // 8,
        measured_compute_j=report.compute_j,
    )
    _, compute_s, upload_s = _observed(seen)
    profile = plan.profiles[device]
    return replace(seen, joules=profile.joules(compute_s, upload_s, report.compute_j))
