"""What a step teaches about the sub-networks, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.d2ft.maps import in_features, out_features
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import Scores, UnitCosts
from lola_flwr.d2ft.steps import compute_s, uploads_s
from lola_flwr.d2ft.subnetworks import Branch, Subnetworks
from lola_flwr.run.records import StepRecord
from lola_flwr.server.spread.plan import StepPlan
from lola_flwr.server.spread.remote import SpreadGradient
from lola_flwr.system.channel import Channel
from lola_flwr.system.own_channel import Moment


def flops_per_token(subnetworks: Subnetworks) -> float:
    """Return what a sub-network's forward pass costs, but for attention itself."""
    first = subnetworks.layers[0]
    maps = [
        linear
        for branch in Branch
        for linear in (*first.branch(branch).into, first.branch(branch).back)
    ]
    weights = sum(out_features(linear) * in_features(linear) for linear in maps)
    return 2.0 * weights / subnetworks.num_groups


def scores_after(
    before: Scores | None, found: SpreadGradient, operations: IntArray
) -> Scores:
    """Return the S sub-networks' scores after a step, shapes [S, 1] and [S].

    Parameters
    ----------
    before
        Their scores before it, as far as they are known.
    found
        What the step has found of each of them that ran fully.
    operations
        What they did in each micro-batch, shape [S, M]. Those that did not run fully
        are as they were before, or as the mean of those that did.
    """
    ran_fully = (operations == Operation.FULL).any(axis=1)

    def known(
        sums: Float64Array, earlier: Float64Array | None
    ) -> npt.NDArray[np.float64]:
        usual = sums[ran_fully].mean() if ran_fully.any() else 1.0
        return np.where(ran_fully, sums, usual if earlier is None else earlier)

    fisher = known(found.squares, None if before is None else before.fisher[:, 0])
    magnitude = known(found.magnitudes, None if before is None else before.magnitude)
    return Scores(fisher[:, None], magnitude, np.zeros((len(fisher), 1)))


def step_record(
    plan: StepPlan,
    found: SpreadGradient,
    subnetworks: Subnetworks,
    *,
    costs: UnitCosts,
    sent_bytes: Mapping[str, int],
    channel: Channel,
    time_s: float,
    seed: int,
) -> StepRecord:
    """Return a step's record: it takes as long as it computes, and devices send.

    Parameters
    ----------
    plan
        The step's plan.
    found
        What came of it.
    subnetworks
        The sub-networks.
    costs
        What operations cost.
    sent_bytes
        What devices send, by device id.
    channel
        What the devices share.
    time_s, seed
        What its draw follows from: wireless time of the steps before, and the run's
        seed.
    """
    seconds = compute_s(
        plan.operations,
        plan.device_of,
        [profile.flops_per_s for profile in plan.profiles],
        num_layers=subnetworks.num_layers,
        forward_flops=np.array(found.tokens) * flops_per_token(subnetworks),
        costs=costs,
    ) + uploads_s(
        [sent_bytes.get(device, 0) for device in plan.device_ids],
        plan.profiles,
        channel=channel,
        moment=Moment(plan.step, time_s, seed),
    )
    return StepRecord(
        server_round=plan.step,
        num_devices=len(plan.device_ids),
        wireless_s=time_s + seconds,
        round_s=seconds,
        observed_s=seconds,
        train_loss=found.loss,
    )
