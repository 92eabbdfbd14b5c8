"""Which heads and neurons of a model are left, as features of its linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.arrays import Float64Array, IntArray
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.maps import base_of, in_features, outputs_dim
from lola_flwr.d2ft.pruning import Pruning, num_pruned
from lola_flwr.d2ft.subnetworks import Branch, LayerNotUnderstood, LayerParts
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.randomness import rng_for


@dataclass(frozen=True, eq=False)
class Cut:
    """What is left of one linear map.

    Parameters
    ----------
    side
        Whether its outputs are cut, or its inputs.
    kept
        The features that are left, in their order.
    width
        How many there were.
    """

    side: Literal["outputs", "inputs"]
    kept: IntArray
    width: int


def cuts_of(
    model: nn.Module, partition: BlockPartition, pruning: Pruning, *, seed: int = 0
) -> dict[str, Cut]:
    """Choose what is left of a model's layers; the model stays as it is.

    It is a function of the values, the options and the seed. Norms are summed in
    float64; of equal heads or neurons the first are left.

    Parameters
    ----------
    model
        The model, without adapters.
    partition
        Its blocks, each of them a layer.
    pruning
        How much of them goes, and by what.
    seed
        Seed of what is drawn.

    Returns
    -------
    The linear maps that become smaller, by their paths.

    Raises
    ------
    UserError
        The model has no values, or layers of which it is not known what goes with a
        head or a neuron.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            "pruning: which heads and neurons go is seen by their values, and this "
            "model has none; load it, or leave pruning at ''."
        )
    found = _layers_of(model, partition)
    paths = {id(module): path for path, module in model.named_modules()}
    cuts: dict[str, Cut] = {}
    for index, parts in enumerate(found):
        for branch, rate in (
            (Branch.ATTENTION, pruning.heads),
            (Branch.FEED_FORWARD, pruning.neurons),
        ):
            if not num_pruned(_num_pieces(parts, branch), rate):
                continue
            worth = _norms(parts, branch)
            if pruning.criterion == "random":
                rng = rng_for(seed, "pruning", index, int(branch))
                worth = rng.permutation(len(worth)).astype(np.float64)
            for module, cut in _cuts(parts, branch, _largest(worth, rate)):
                path = paths[id(module)]
                if path in cuts:
                    raise UserError(
                        f"pruning: {path} is of two layers, which would be pruned "
                        "differently; leave pruning at '', or choose a model of which "
                        "each layer has its own."
                    )
                cuts[path] = cut
    return cuts


def _layers_of(model: nn.Module, partition: BlockPartition) -> Sequence[LayerParts]:
    try:
        return find_subnetworks(model, partition).layers
    except LayerNotUnderstood as error:
        reason = str(error).removesuffix(".")
        raise UserError(
            f"pruning: {reason}; leave pruning at '' for this model."
        ) from error


def _num_pieces(parts: LayerParts, branch: Branch) -> int:
    """Return how many heads of keys a branch has, or neurons."""
    if branch == Branch.ATTENTION:
        return parts.num_key_heads
    return in_features(parts.down)


def _features(pieces: IntArray, num_pieces: int, width: int) -> IntArray:
    """Return the features, of so many, that pieces of them consist of."""
    size = width // num_pieces
    found: IntArray = (pieces[:, None] * size + np.arange(size)).reshape(-1)
    return found


def _largest(worth: Float64Array, rate: float) -> IntArray:
    """Return the pieces that stay, in their order; of equal ones the first."""
    order = np.argsort(-worth, kind="stable")
    kept: IntArray = np.sort(order[: len(worth) - num_pruned(len(worth), rate)])
    return kept


def _cuts(
    parts: LayerParts, branch: Branch, kept: IntArray
) -> list[tuple[nn.Module, Cut]]:
    """Return what the maps of a branch keep, of which these pieces stay."""
    into, back, *_ = parts.branch(branch)
    count = _num_pieces(parts, branch)
    found = []
    for linear, widths in zip(into, parts.portions(branch), strict=True):
        starts = accumulate(widths[:-1], initial=0)
        outputs = [
            start + _features(kept, count, width)
            for start, width in zip(starts, widths, strict=True)
        ]
        found.append((linear, Cut("outputs", np.concatenate(outputs), sum(widths))))
    width = in_features(back)
    return [*found, (back, Cut("inputs", _features(kept, count, width), width))]


def _norms(parts: LayerParts, branch: Branch) -> Float64Array:
    """Return the squared norm of the weights of each head or neuron of a branch."""
    into, back, *_ = parts.branch(branch)
    count = _num_pieces(parts, branch)
    total: Float64Array = _squares(back, outputs=False).reshape(count, -1).sum(axis=1)
    for linear, widths in zip(into, parts.portions(branch), strict=True):
        squares = np.split(_squares(linear, outputs=True), np.cumsum(widths[:-1]))
        total = total + sum(part.reshape(count, -1).sum(axis=1) for part in squares)
    return total


def _squares(linear: nn.Module, *, outputs: bool) -> Float64Array:
    """Return the sum of a matrix's squares, for each of its outputs or inputs."""
    base = base_of(linear)
    weight: Tensor = base.weight.detach()
    other = 1 - outputs_dim(base) if outputs else outputs_dim(base)
    found: Float64Array = (
        weight.to(torch.float64).square().sum(dim=other).numpy(force=True)
    )
    return found
