"""What a step teaches about the sub-networks, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float64Array
from lola_flwr.d2ft.maps import in_features, out_features
from lola_flwr.d2ft.schedule import Scores, UnitCosts
from lola_flwr.d2ft.steps import compute_s, uploads_s
from lola_flwr.d2ft.subnetworks import Branch, Subnetworks
from lola_flwr.server.spread.plan import StepPlan
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
    before: Scores | None,
    *,
    squares: Float64Array,
    magnitudes: Float64Array,
    ran_fully: npt.NDArray[np.bool_],
) -> Scores:
    """Return the S sub-networks' scores after a step, shapes [S, 1] and [S].

    Parameters
    ----------
    before
        Their scores before it, as far as they are known.
    squares, magnitudes
        What the step has found of each of them that ran fully: sums of the squares of
        its gradient, and of the magnitudes of its values, shape [S].
    ran_fully
        Which of them did, shape [S]. The others are as they were before, or as the mean
        of those that did.
    """

    def known(
        found: Float64Array, earlier: Float64Array | None
    ) -> npt.NDArray[np.float64]:
        usual = found[ran_fully].mean() if ran_fully.any() else 1.0
        return np.where(ran_fully, found, usual if earlier is None else earlier)

    fisher = known(squares, None if before is None else before.fisher[:, 0])[:, None]
    magnitude = known(magnitudes, None if before is None else before.magnitude)
    return Scores(fisher, magnitude, np.zeros_like(fisher))


def step_s(
    plan: StepPlan,
    subnetworks: Subnetworks,
    *,
    costs: UnitCosts,
    tokens: Sequence[int],
    sent_bytes: Mapping[str, int],
    channel: Channel,
    time_s: float,
    seed: int,
) -> float:
    """Return how long a step takes: its computation, and what devices send.

    Parameters
    ----------
    plan
        The step's plan.
    subnetworks
        The sub-networks.
    costs
        What operations cost.
    tokens
        Tokens of each micro-batch.
    sent_bytes
        What devices send, by device id.
    channel
        What the devices share.
    time_s, seed
        What its draw follows from: wireless time of the steps before, and the run's
        seed.
    """
    return compute_s(
        plan.operations,
        plan.device_of,
        [profile.flops_per_s for profile in plan.profiles],
        num_layers=subnetworks.num_layers,
        forward_flops=np.array(tokens) * flops_per_token(subnetworks),
        costs=costs,
    ) + uploads_s(
        [sent_bytes.get(device, 0) for device in plan.device_ids],
        plan.profiles,
        channel=channel,
        moment=Moment(plan.step, time_s, seed),
    )
