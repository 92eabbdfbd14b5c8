"""What a step teaches about the sub-networks, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lola_flwr.d2ft.maps import in_features, out_features
from lola_flwr.d2ft.schedule import Scores
from lola_flwr.d2ft.subnetworks import Branch, Subnetworks, parameter_slices


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
    subnetworks: Subnetworks,
    before: Scores | None,
    *,
    gradients: Mapping[str, Tensor],
    ran_fully: npt.NDArray[np.bool_],
    values: Mapping[str, npt.NDArray[np.float32]],
) -> Scores:
    """Return the S sub-networks' scores after a step, shapes [S, 1] and [S].

    Parameters
    ----------
    subnetworks
        The sub-networks.
    before
        Their scores before it, as far as they are known.
    gradients
        The step's gradients, by parameter name.
    ran_fully
        Which of them ran fully, shape [S]. The Fisher information of the others is what
        it was before, or the mean.
    values
        Trainable values after the step.
    """
    found = np.array(
        [
            sum(float(part.square().sum()) for part in parts)
            for parts in parameter_slices(subnetworks, dict(gradients))
        ]
    )
    usual = np.full(found.size, found[ran_fully].mean() if ran_fully.any() else 1.0)
    known = usual if before is None else before.fisher[:, 0]
    fisher = np.where(ran_fully, found, known)[:, None]
    tensors = {name: torch.from_numpy(v) for name, v in values.items()}
    magnitude = [
        sum(float(part.abs().sum()) for part in parts)
        for parts in parameter_slices(subnetworks, tensors)
    ]
    return Scores(fisher, np.array(magnitude), np.zeros_like(fisher))
