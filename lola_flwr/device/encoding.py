"""Encode what a device uploads, and keep what its codec leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lola_flwr.arrays import Float32Array
from lola_flwr.device.store import Residuals
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.wire.codec import codec_named, encode_with_feedback
from lola_flwr.wire.components import components_of, sent_part, with_part
from lola_flwr.wire.low_rank import projection_of
from lola_flwr.wire.npy import WireArray
from lola_flwr.wire.packing import pack
from lola_flwr.wire.records import Assignment


def encoded_gradients(
    gradients: Mapping[str, Float32Array],
    partition: BlockPartition,
    assignment: Assignment,
    *,
    store: Path | None,
    device: str,
) -> WireArray:
    """Return gradients as they travel: projected, if asked for, and encoded.

    Parameters
    ----------
    gradients, partition, assignment
        As for `encode_update`.
    store
        Directory in which the device keeps what its codecs leave out; None if it keeps
        nothing.
    device
        The device's name.

    Raises
    ------
    UserError
        As for `encode_update`.
    """
    projection = projection_of(assignment)
    if projection is not None:
        gradients = {
            name: projection.project(assignment.server_round, name, gradient)
            for name, gradient in gradients.items()
        }
    residuals = None if store is None else Residuals(store, device)
    return encode_update(gradients, partition, assignment, residuals)


def encode_update(
    gradients: Mapping[str, Float32Array],
    partition: BlockPartition,
    assignment: Assignment,
    residuals: Residuals | None,
) -> WireArray:
    """Encode the gradients that an assignment asks for.

    Parameters
    ----------
    gradients
        Gradients of the blocks and of the head, by parameter.
    partition
        The model's blocks.
    assignment
        Names the codec, and the components that are to be sent if not all are; tells
        whether the head's gradient is.
    residuals
        What this device's codecs have left out before; None if it keeps nothing. Of
        components that are not sent it stays as it is.

    Returns
    -------
    What travels, of all these parameters in one array.

    Raises
    ------
    UserError
        The codec is unknown, or wants residuals and there is nowhere to keep them; or
        the gradients lack a component.
    """
    codec = codec_named(assignment.codec)
    if codec.has_feedback and residuals is None:
        raise UserError(
            f"codec={assignment.codec!r} leaves out what a device must keep for its "
            "next gradient; give the device a directory: BlockDevice(store=...)."
        )
    parts = {f"block-{block}": partition.blocks[block] for block in assignment.blocks}
    asked = components_of(assignment)
    sent = {f"block-{block}": components for block, components in asked.items()}
    if assignment.sends_head:
        parts["head"] = partition.head
    projection = projection_of(assignment)
    if projection is not None:
        # What was left out in one basis means nothing in another.
        basis = projection.basis_number(assignment.server_round)
        parts = {f"{part}-basis-{basis}": names for part, names in parts.items()}
    wire: dict[str, WireArray] = {}
    for part, names in parts.items():
        before = residuals.take(part, assignment.server_round) if residuals else {}
        left_out: dict[str, Float32Array] = {}
        for name in names:
            some, residual = sent.get(part), before.get(name)
            wire[name], left = encode_with_feedback(
                codec,
                sent_part(name, gradients[name], some),
                None if residual is None else sent_part(name, residual, some),
            )
            if residual is None:
                residual = np.zeros_like(gradients[name])
            if left is not None:
                left_out[name] = with_part(name, residual, left, some)
        if residuals:
            residuals.put(part, assignment.server_round, left_out)
    return pack(wire)
