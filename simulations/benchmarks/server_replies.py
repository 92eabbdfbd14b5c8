"""What devices send a server that is measured: updates of any plan, of given sizes."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np

from lola_flwr.arrays import Float32Array
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.round.plan import RoundPlan
from lola_flwr.wire.records import UpdateReport


def update_of(gradient: Float32Array) -> bytes:
    """Return a block's gradient as a device sends it."""
    stream = BytesIO()
    np.save(stream, gradient, allow_pickle=False)
    return stream.getvalue()


def replies_to(plan: RoundPlan, updates: Sequence[bytes]) -> list[DeviceReply]:
    """Return the replies of all devices of a plan.

    Parameters
    ----------
    plan
        The round's plan.
    updates
        By block, as of `update_of`.
    """
    return [
        DeviceReply(
            device_id=device,
            tensors=[updates[task.block_index]],
            num_examples=32,
            report=UpdateReport(
                server_round=plan.server_round,
                block_index=task.block_index,
                update_kind="gradient",
                loss=0.7,
                compute_s=1.0,
                compute_clock="simulated",
            ).to_record(),
        )
        for device, task in plan.assignments.items()
    ]
