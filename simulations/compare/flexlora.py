"""FlexLoRA: adapters of different ranks, put together as updates of full size.

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous
Tasks and Client Resources", arXiv:2402.11505: a device has as high a rank as it has
resources for; the server averages the products ``B A``, and each device is given the
best approximation of the mean that its rank allows, by singular values.

Read was the abstract: that ranks follow speeds is our choice, and that ``B`` holds the
singular values. Departure: a device of rank r trains the first r rows of ``A`` and
columns of ``B`` of a model that has the largest rank, the others zero: they have no
gradient, so that it is the same training, at the operations and the scale of the
largest rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from lola_flwr.arrays import Float32Array, Float32Arrays
from lola_flwr.errors import UserError
from simulations.compare.contender import (
    Contender,
    Fleet,
    Update,
    in_fp32,
    mean_of_those_that_trained,
)

_A, _B = ".lora_A.", ".lora_B."


def flexlora(fleet: Fleet) -> Contender:
    """Return rounds of devices whose ranks differ: the faster one is, the higher.

    Raises
    ------
    UserError
        What is trained is not LoRA, a rank is none of its, or a codec is chosen.
    """
    in_fp32(fleet.method)
    ranks = device_ranks(fleet)
    whole = fleet.part_from(0)
    adapters = [name for name in whole.names if _A in name or _B in name]
    rank = max(fleet.method.ranks)
    sizes = sum(4 * int(np.prod(fleet.shapes[name])) for name in adapters)
    parts = {
        device: replace(
            whole, sent_bytes=whole.sent_bytes - sizes * (rank - own) // rank
        )
        for device, own in enumerate(ranks)
    }
    return Contender(
        parts=lambda *_: parts,
        given=lambda device, values: truncated(values, ranks[device]),
        merged=partial(merged, rank=rank),
    )


def device_ranks(fleet: Fleet) -> list[int]:
    """Return each device's rank: the ranks, evenly, in the order of the speeds."""
    pairs = [name for name in fleet.part_from(0).names if _A in name]
    if not pairs:
        raise UserError(
            'kind="flexlora" needs the adapters of LoRA; add tuning = "lora".'
        )
    held = {int(fleet.shapes[name][0]) for name in pairs}
    ranks = sorted(fleet.method.ranks)
    if not ranks or ranks[0] < 1 or held != {ranks[-1]}:
        raise UserError(
            f"ranks = {list(fleet.method.ranks)} of flexlora must be at least 1, and "
            f"the largest that of the adapters, r = {', '.join(map(str, held))}."
        )
    speeds = [profile.flops_per_s for profile in fleet.profiles]
    place = np.argsort(np.argsort(speeds, kind="stable"), kind="stable")
    return [ranks[p * len(ranks) // len(speeds)] for p in place.tolist()]


def truncated(values: Float32Arrays, rank: int) -> Float32Arrays:
    """Return values of whose adapters only the first components are not zero."""
    cut = dict(values)
    for name, value in values.items():
        if _A in name or _B in name:
            kept = np.zeros_like(value)
            rows = np.s_[:rank] if _A in name else np.s_[:, :rank]
            kept[rows] = value[rows]
            cut[name] = kept
    return cut


def merged(
    values: Float32Arrays, updates: Mapping[int, Update], *, rank: int
) -> Float32Arrays:
    """Return the means: of the adapters' products, and of all other values."""
    mean = dict(mean_of_those_that_trained(values, updates))
    total = sum(update.num_examples for update in updates.values())
    for name in [name for name in values if _A in name]:
        other = name.replace(_A, _B)
        weighted = [
            (update.num_examples / total, update.values[name], update.values[other])
            for update in updates.values()
        ]
        mean[name], mean[other] = decomposed(
            np.concatenate([a for _, a, _ in weighted]),
            np.concatenate([weight * b for weight, _, b in weighted], axis=1),
            rank,
        )
    return mean


def decomposed(
    a: Float32Array, b: Float32Array, rank: int
) -> tuple[Float32Array, Float32Array]:
    """Return the best factors of a rank of the product of two others.

    Parameters
    ----------
    a, b
        Factors of the product ``b @ a``, of any rank m; shapes [m, in] and [out, m].
    rank
        Rank of the result.

    Returns
    -------
    ``A`` with orthonormal rows, and ``B``, its columns by falling singular values: the
    first r of both are the best factors of rank r.
    """
    # The product's own decomposition would be one of a full-size matrix.
    of_b, left = np.linalg.qr(b.astype(np.float64))
    of_a, right = np.linalg.qr(a.T.astype(np.float64))
    u, singular, vt = np.linalg.svd(left @ right.T)
    count = singular.size
    return (
        (vt[:count] @ of_a.T)[:rank].astype(np.float32),
        (of_b @ (u[:, :count] * singular))[:, :rank].astype(np.float32),
    )
