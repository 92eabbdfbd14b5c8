"""Attacks by what is around the gradients: whole replies, claims, when devices come."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

from lola_flwr.server.replies import DeviceReply
from lola_flwr.system.devices import DeviceProfile
from simulations.attacks.attack import ABSENT, BOTH, Attack, Turn, npy, scaled

# First round of devices that come late.
JOIN = 40


def _replayed(reply: DeviceReply, turn: Turn) -> DeviceReply:
    """Send what was computed for the block when it was first asked for."""
    key = turn.device, turn.assignment.block_index
    first = turn.gang.kept.setdefault(key, reply)
    return replace(reply, tensors=first.tensors)


def _as_weights(reply: DeviceReply, turn: Turn) -> DeviceReply:
    """Return weights in a round of gradients: far off, against the gradient."""
    names = turn.gang.partition.update_names(
        *turn.assignment.blocks, head=turn.assignment.sends_head
    )
    now, computed = turn.gang.values[-1], turn.gang.honest
    tensors = {name: npy(now[name] + 9.9 * computed[name][-1]) for name in names}
    report = {**reply.report, "update-kind": "weights"}
    return replace(reply, tensors=tensors, report=report)


def claims_to_be_fastest(profile: DeviceProfile) -> DeviceProfile:
    """Return what a device claims that wants all of the work."""
    return replace(profile, flops_per_s=1e13, snr_db=40.0, memory_bytes=1e12)


def _never_slow(reply: DeviceReply, turn: Turn) -> DeviceReply:
    """Say that no time was taken, and that the batch was as large as may be."""
    report = {**reply.report, "compute-s": 1e-6, "peak-memory-bytes": 1.0}
    return replace(reply, num_examples=turn.assignment.batch_size, report=report)


LIES = (
    Attack(name=ABSENT, joins_at_round=sys.maxsize, methods=BOTH),
    Attack(
        name="free rider: replay",
        reply=_replayed,
    ),
    Attack(
        name="free rider: zeros",
        gradients=lambda honest, turn: scaled(honest, 0.0),
    ),
    Attack(
        name="values of 3e38",
        gradients=lambda honest, turn: {
            name: np.where(gradient > 0, -3e38, 3e38).astype(np.float32)
            for name, gradient in honest.items()
        },
    ),
    Attack(name="weights for gradients", reply=_as_weights),
    Attack(
        name="claims to be fastest, sign flip",
        gradients=lambda honest, turn: scaled(honest, -1.0),
        reply=_never_slow,
        profile=claims_to_be_fastest,
    ),
    Attack(
        name="late sybils, sign flip",
        gradients=lambda honest, turn: scaled(honest, -1.0),
        joins_at_round=JOIN,
    ),
)
