"""Take a round's replies in: those that hold, and why the others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt

from lola_flwr.server.assembly import BlockUpdate
from lola_flwr.server.norm_limits import NormHistory, NormLimits
from lola_flwr.server.own_examples import ExampleGradients
from lola_flwr.server.received import UpdateRefused
from lola_flwr.server.replies import DeviceReply, UpdateReader, Upload
from lola_flwr.server.reputation import Reputation
from lola_flwr.server.round.judging import OwnExamples, judged
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.server.round.waits import unexplained_waits
from lola_flwr.wire.records import OUT_OF_MEMORY, UpdateReport


@dataclass(frozen=True, eq=False)
class AcceptedReply:
    """A reply that can be used.

    Parameters
    ----------
    update
        The update in it.
    report
        What the device says about it.
    upload
        What it cost to send.
    answered_s
        Seconds from the round's messages to its last byte, None if nothing tells.
    """

    update: BlockUpdate
    report: UpdateReport
    upload: Upload
    answered_s: float | None = None

    @property
    def explained_s(self) -> float | None:
        """Seconds in which it computed, as it reported, and sent; None if none tell."""
        if self.answered_s is None or self.upload.upload_s is None:
            return None
        is_real = self.report.compute_clock == "measured"
        return self.upload.upload_s + (self.report.compute_s or 0.0) * is_real

    @property
    def downlink_s(self) -> float | None:
        """Seconds before those, in which it waited for its message, and took it in."""
        if self.answered_s is None or self.explained_s is None:
            return None
        return max(self.answered_s - self.explained_s, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundReplies:
    """What the devices of one round replied.

    Parameters
    ----------
    accepted
        By device id, in the order in which they came.
    refusals
        Why a device's reply was refused, the first one's if there are more, by id.
    refused
        Refused replies, counted by reason.
    lacked_bytes
        Of each device that was asked: None if it did what it was asked for, else the
        memory that it turned out to lack, or 0 for any other failure. A device that
        lacks what it was not sent has not failed, and has no entry.
    distrusted
        Devices whose updates were refused for what they sent before.
    unexplained_s
        How long devices kept the round waiting for no known reason. Their updates are
        used, but they have failed.
    lost_copies
        Devices that said they no longer hold what the server left out.
    held
        Which version the others say that they hold, whether or not their update was
        used; None: they keep nothing.
    norms
        Norms of the updates of this round and of those before.
    reputation
        How far devices are trusted after it, None if they are not judged.
    """

    accepted: Mapping[str, AcceptedReply]
    refusals: Mapping[str, str]
    refused: Mapping[str, int]
    lacked_bytes: Mapping[str, float | None]
    distrusted: Set[str]
    lost_copies: Set[str]
    held: Mapping[str, str | None]
    unexplained_s: Mapping[str, float]
    norms: NormHistory
    reputation: Reputation | None


def read_replies(
    reader: UpdateReader,
    plan: RoundPlan,
    replies: Iterable[DeviceReply],
    sent: Mapping[str, npt.NDArray[Any]],
    norms: NormHistory,
    limits: NormLimits,
    reputation: Reputation | None = None,
    own_examples: ExampleGradients | None = None,
) -> RoundReplies:
    """Check replies, none of which is trusted.

    Parameters
    ----------
    reader
        Reads a single one.
    plan
        What the devices were asked for.
    replies
        Replies received. A device's first usable one counts.
    sent
        The model's arrays when they were asked, by name.
    norms
        Norms of the updates of the rounds before.
    limits
        How large updates may be.
    reputation
        How far devices are trusted; None: nobody is judged by what they sent before.
    own_examples
        Gives the gradients of the server's own examples, if it has any.
    """
    accepted: dict[str, AcceptedReply] = {}
    refusals: dict[str, str] = {}
    refused: Counter[str] = Counter()
    assignments = plan.assignments
    lacked_bytes: dict[str, float | None] = dict.fromkeys(assignments, 0.0)
    lost_copies: set[str] = set()
    for reply in replies:
        device = reply.device_id
        try:
            if device in accepted:
                raise UpdateRefused("duplicate", "the device replied before")
            update, report = reader.read(
                reply, assignments.get(device), sent, plan.drawn.get(device)
            )
        except UpdateRefused as refusal:
            refused[refusal.reason] += 1
            refusals.setdefault(device, str(refusal))
            if refusal.reason == "lost-copy":
                lost_copies.add(device)
                if plan.leaves_out(device):
                    # No failure: it is to be sent everything in the next round.
                    lacked_bytes.pop(device, None)
            if refusal.reason == OUT_OF_MEMORY:
                lacked_bytes[device] = assignments[device].memory_bytes
            continue
        num_used = {"gradient": 1, "zeroth-order": 0}.get(report.update_kind)
        if num_used is None:
            num_used = len(update.gradients) + len(update.statistics)
        upload = Upload.of(reply, report, num_used)
        accepted[device] = AcceptedReply(update, report, upload, reply.answered_s)
        lacked_bytes[device] = None
    held = {device: reply.report.held for device, reply in accepted.items()}
    # First-order updates, in the plan's order, lest it matters who came first.
    judgement = judged(
        reader.partition,
        plan,
        {
            device: accepted[device].update
            for device in plan.device_ids
            if device in accepted and not accepted[device].update.zeroth_order
        },
        norms,
        limits,
        reputation,
        None if own_examples is None else OwnExamples(own_examples, sent),
    )
    for device, why in judgement.refused.items():
        refused[why.reason] += 1
        refusals.setdefault(device, str(why))
        lacked_bytes[device] = 0.0
        del accepted[device]
    for device, scale in judgement.scale.items():
        if scale < 1:
            scaled = accepted[device].update.scaled(scale)
            accepted[device] = replace(accepted[device], update=scaled)
    unexplained_s = _unexplained_s(accepted)
    lacked_bytes.update(dict.fromkeys(unexplained_s, 0.0))
    return RoundReplies(
        accepted=accepted,
        refusals=refusals,
        refused=dict(refused),
        lacked_bytes=lacked_bytes,
        distrusted=judgement.distrusted,
        lost_copies=lost_copies,
        held=held,
        unexplained_s=unexplained_s,
        norms=judgement.norms,
        reputation=judgement.reputation,
    )


def _unexplained_s(accepted: Mapping[str, AcceptedReply]) -> dict[str, float]:
    """Return how long devices kept the round waiting, where uploads were timed."""
    answered_s, explained_s = {}, {}
    for device, reply in accepted.items():
        if reply.answered_s is not None and reply.explained_s is not None:
            answered_s[device] = reply.answered_s
            explained_s[device] = reply.explained_s
    return unexplained_waits(answered_s, explained_s)
