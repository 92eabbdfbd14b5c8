"""What the server knows after a round: a state from a state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from lola_flwr.model.blocks import BlockPartition
from lola_flwr.run.records import RoundRecord
from lola_flwr.server.round.intake import AcceptedReply, RoundReplies
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.server.state import RunState
from lola_flwr.system.estimation import Observation, RateObservation
from lola_flwr.system.gradient_noise import NoiseObservation
from lola_flwr.wire.components import component_squares
from lola_flwr.wire.records import SQUARES_TYPE


def learned(
    state: RunState,
    plan: RoundPlan,
    replies: RoundReplies,
    record: RoundRecord,
    *,
    partition: BlockPartition,
    relative_moves: Mapping[int, float],
    correct_profiles: bool,
) -> RunState:
    """Take in how a round went: for times, rates, rotation, copies and rests.

    Parameters
    ----------
    state
        What was known before.
    plan
        What was asked of whom.
    replies
        What became of it.
    record
        The round's record.
    partition
        The model's blocks.
    relative_moves
        How far each block that was stepped has moved, by index.
    correct_profiles
        Whether observed times correct what devices claim.
    """
    meetings = dict(state.meetings)
    for device in replies.accepted:
        name = plan.profiles[device].name
        counts = [*state.meetings_of(name)]
        for block in plan.assignments[device].blocks:
            counts[block] += 1
        meetings[name] = tuple(counts)
    lacked_bytes = {
        plan.profiles[device].name: lacked
        for device, lacked in replies.lacked_bytes.items()
    }
    distrusted = {plan.profiles[device].name for device in replies.distrusted}
    absences = state.fleet.absences.after(plan.server_round, lacked_bytes, distrusted)
    if correct_profiles:
        state = _corrected(state, plan, replies)
    return replace(
        _acknowledged(state, plan, replies),
        server_round=plan.server_round,
        wireless_s=record.wireless_s,
        joules=record.joules,
        fleet=replace(state.fleet, absences=absences),
        meetings=meetings,
        influence=state.influence.after(
            (block, plan.profiles[device].name)
            for device in plan.device_ids
            if device in replies.accepted
            for block in plan.assignments[device].blocks
        ),
        history=state.history.after_round(plan.server_round, relative_moves),
        norms=replies.norms,
        reputation=replies.reputation or state.reputation,
        noise=state.noise.update(_noise_observed(plan, replies)),
        pace=state.pace.after(plan.solved.brought),
        components=state.components.after(_components_seen(plan, replies, partition)),
    )


def _components_seen(
    plan: RoundPlan, replies: RoundReplies, partition: BlockPartition
) -> Iterator[tuple[int, Mapping[int, float]]]:
    """Give how large the components are that devices sent, block by block."""
    if plan.solved.rank is None:
        return
    for device in plan.device_ids:
        if device in replies.accepted:
            gradients = replies.accepted[device].update.gradients
            drawn = plan.drawn.get(device)
            for block in plan.assignments[device].blocks:
                names = partition.blocks[block]
                yield block, component_squares(gradients, names, drawn, block)


def _noise_observed(
    plan: RoundPlan, replies: RoundReplies
) -> Iterator[NoiseObservation]:
    """Give what devices said of the squares of their gradients, block by block."""
    for device, accepted in replies.accepted.items():
        report = accepted.report
        few, most = report.few_examples, report.all_examples
        few_square, square = report.few_square, report.all_square
        if not (few and most) or few_square is None or square is None:
            continue
        blocks = plan.assignments[device].blocks
        further = np.frombuffer(report.further_squares or b"", SQUARES_TYPE)
        pairs = [(few_square, square), *further.reshape(2, -1).T.tolist()]
        for block, (of_few, of_all) in zip(blocks, pairs, strict=False):
            yield NoiseObservation(block, few, of_few, most, of_all)


def _acknowledged(state: RunState, plan: RoundPlan, replies: RoundReplies) -> RunState:
    """Take in what devices hold now, where they were sent what they lacked."""
    held = state.held
    for device, manifest in plan.overheard.items():
        held = held.acknowledged(device, manifest, manifest.version)
    for device in replies.lost_copies:
        held = held.without(device)
    for device, version in replies.held.items():
        if device in plan.manifests:
            held = held.acknowledged(device, plan.manifests[device], version)
    return replace(state, held=held)


def _corrected(state: RunState, plan: RoundPlan, replies: RoundReplies) -> RunState:
    """Take in how long the devices waited, computed and sent."""
    computed = [
        Observation(
            plan.profiles[device].name,
            accepted.report.block_index,
            plan.claimed_s[device],
            accepted.report.compute_s,
        )
        for device, accepted in replies.accepted.items()
        if accepted.report.compute_s is not None
    ]
    sent = [
        observation
        for device, accepted in replies.accepted.items()
        if (observation := _rate_observed(plan, device, accepted)) is not None
    ]
    return replace(
        state,
        estimate=state.estimate.update(computed),
        rates=state.rates.update(sent),
        downlinks=state.downlinks.update(
            {
                plan.profiles[device].name: accepted.downlink_s
                for device, accepted in replies.accepted.items()
                if accepted.downlink_s is not None
            }
        ),
    )


def _rate_observed(
    plan: RoundPlan, device: str, accepted: AcceptedReply
) -> RateObservation | None:
    """Return what an upload shows of a device's link, if it shows anything."""
    profile, upload = plan.profiles[device], accepted.upload
    if (
        profile.uplink_bps is None
        or upload.upload_s is None
        # A few numbers take no longer than any message: no link shows.
        or accepted.update.zeroth_order
    ):
        return None
    return RateObservation(
        device=profile.name,
        claimed_bps=profile.uplink_bps,
        payload_bits=upload.payload_bits,
        upload_s=upload.upload_s,
        share=plan.assignments[device].share,
        held=accepted.report.uplink_limit is not None,
    )
