"""How many outliers each block's weights hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lola_flwr.model.blocks import BlockPartition


def outlier_ratios(
    weight_of: Callable[[str], npt.NDArray[np.float32]],
    partition: BlockPartition,
    *,
    threshold: float = 5.0,
) -> tuple[float, ...]:
    """Return the share of each block's matrix elements that are outliers.

    Parameters
    ----------
    weight_of
        Gives the model's weight of a name.
    partition
        Its blocks; where these are adapters, the layers that they are in count.
    threshold
        An element is an outlier if its magnitude exceeds this many times the mean
        magnitude of its matrix.

    Returns
    -------
    Ratios, shape [N]; at least one element's worth, so that every block has a chance.

    Notes
    -----
    OwLore (arXiv:2405.18380) takes the outliers of ``|W| * ||x||``, the weights times
    the norms of their inputs over calibration data. A server has no data: the weights
    alone stand for it here.
    """
    ratios = []
    for block in partition.layers or partition.blocks:
        elements = outliers = 0
        for weight in map(weight_of, block):
            if weight.ndim == 2:
                size = abs(weight)
                elements += size.size
                outliers += int(np.count_nonzero(size > threshold * size.mean()))
        ratios.append(max(outliers, 1) / max(elements, 1))
    return tuple(ratios)
