"""Sum a round up for the log, from its plan and from what the devices replied."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lola_flwr.run.records import BlockRecord, RoundRecord
from lola_flwr.server.round.intake import RoundReplies
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.server.round.problem import ProblemStatement


def round_record(
    plan: RoundPlan,
    replies: RoundReplies,
    statement: ProblemStatement,
    *,
    sent_nbytes: Mapping[str, int],
    wireless_s: float,
) -> RoundRecord:
    """Return the record of a round.

    Parameters
    ----------
    plan
        What was asked of whom.
    replies
        What became of it.
    statement
        The blocks, their costs, and the constant part of every round.
    sent_nbytes
        Bytes of the model's arrays, by name in the order of sending.
    wireless_s
        Observed latencies of the rounds before, seconds.
    """
    blocks = _block_records(plan, replies, statement, sent_nbytes)
    observed_s = statement.constant_s + max(map(_observed_s, blocks))
    losses, weights = [], []
    for accepted in replies.accepted.values():
        if accepted.report.loss is not None:
            losses.append(accepted.report.loss)
            weights.append(accepted.update.num_examples)
    return RoundRecord(
        server_round=plan.server_round,
        num_devices=len(plan.device_ids),
        num_excluded=plan.num_excluded,
        round_s=plan.allocation.round_s,
        observed_s=observed_s,
        bound_s=plan.allocation.bound_s,
        wireless_s=wireless_s + observed_s,
        train_loss=float(np.average(losses, weights=weights)) if losses else None,
        refused=replies.refused,
        blocks=blocks,
    )


def _observed_s(block: BlockRecord) -> float:
    """Return a device's latency, as measured where it was, else as planned."""
    measured_s, reported_s = block.measured_upload_s, block.reported_compute_s
    return (block.upload_s if measured_s is None else measured_s) + (
        block.compute_s if reported_s is None else reported_s
    )


def _block_records(
    plan: RoundPlan,
    replies: RoundReplies,
    statement: ProblemStatement,
    sent_nbytes: Mapping[str, int],
) -> tuple[BlockRecord, ...]:
    """Return the active devices' records, by block."""
    records = []
    costs = statement.costs
    payloads = plan.payloads
    upload_s = plan.allocation.upload_s(plan.problem)
    for row, device, block in plan.active():
        profile = plan.profiles[device]
        accepted = replies.accepted.get(device)
        report = accepted.report if accepted else None
        upload = accepted.upload if accepted else None
        refusal = replies.refusals.get(device, "no reply")
        assignment = plan.assignments[device]
        required_bytes = assignment.memory_bytes
        if required_bytes is None:
            required_bytes = float(costs.required_bytes([profile])[0, block])
        level = plan.codec_level[row]
        codec, payload_bits = payloads.codecs[level], payloads.bits[level, block]
        zeroth_order = statement.zeroth_order
        if zeroth_order is not None and assignment.direction_seed is not None:
            # Projections on directions travel as they are.
            codec, payload_bits = "", zeroth_order.costs.payload_bits[block]
        records.append(
            BlockRecord(
                block_index=block,
                depth=statement.partition.depth(block),
                device=profile.name,
                share=float(plan.allocation.share[row]),
                compute_s=float(plan.problem.compute_s[row, block]),
                upload_s=float(upload_s[row]),
                reported_compute_s=report.compute_s if report else None,
                compute_clock=report.compute_clock if report else "",
                loss=report.loss if report else None,
                status="accepted" if accepted else refusal,
                ignored_arrays=upload.ignored_arrays if upload else 0,
                measured_upload_s=upload.upload_s if upload else None,
                uplink_limit=report.uplink_limit if report else None,
                codec=codec,
                payload_bytes=int(payload_bits) // 8,
                received_bytes=int(upload.payload_bits) // 8 if upload else 0,
                sent_bytes=sum(
                    sent_nbytes[name]
                    for name in plan.sent_names(device, [*sent_nbytes])
                ),
                required_memory_bytes=required_bytes,
                memory_bytes=profile.memory_bytes,
                peak_memory_bytes=report.peak_memory_bytes if report else None,
            )
        )
    return tuple(sorted(records, key=lambda record: record.block_index))
