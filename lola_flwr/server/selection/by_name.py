"""Block selectors by name, for run configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.errors import UserError, nearest
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.server.selection.outliers import outlier_ratios
from lola_flwr.server.selection.selectors import (
    BlockSelector,
    BoundedStaleness,
    ImportanceSampled,
    LargestMoves,
    Lisa,
    OutlierWeighted,
    Progressive,
    RoundRobin,
)

SELECTORS: Mapping[str, Callable[..., BlockSelector]] = {
    "round-robin": RoundRobin,
    "lisa": Lisa,
    "ist": ImportanceSampled,
    "owlore": OutlierWeighted,
    "slimfit": LargestMoves,
    "progfed": Progressive,
}

# The selector of this name follows what a loss on the server's own data responds to.
NEEDS_RESPONSE = "ist"


def selector_named(
    name: str,
    options: Mapping[str, Any],
    *,
    partition: BlockPartition,
    weight_of: Callable[[str], npt.NDArray[np.float32]],
) -> BlockSelector | None:
    """Make the selector of a name.

    Parameters
    ----------
    name
        A name from `SELECTORS`, or "all".
    options
        Its arguments; ``max_staleness`` puts a `BoundedStaleness` around it.
    partition
        The model's blocks.
    weight_of
        Gives the model's weight of a name, before the first round; asked by a selector
        that looks at weights.

    Returns
    -------
    The selector; None for "all".

    Raises
    ------
    UserError
        Unknown name, or options that the selector refuses.
    """
    if name == "all":
        if options:
            raise UserError(
                f"selector='all' takes no options, but has {', '.join(options)}."
            )
        return None
    if name not in SELECTORS:
        raise UserError(
            f"selector={name!r} is unknown; use 'all' or one of "
            f"{', '.join(SELECTORS)}.{nearest(name, SELECTORS)}"
        )
    options = dict(options)
    max_staleness = options.pop("max_staleness", None)
    if name == "owlore":
        options["weights"] = outlier_ratios(weight_of, partition)
    try:
        selector = SELECTORS[name](**options)
    except TypeError as error:
        raise UserError(f"selector={name!r}: {error}.") from None
    if max_staleness is None:
        return selector
    return BoundedStaleness(selector, max_staleness)
