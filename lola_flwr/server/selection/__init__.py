"""Which blocks are trained in a round that does not train all of them."""

from lola_flwr.server.selection.by_name import NEEDS_RESPONSE, SELECTORS, selector_named
from lola_flwr.server.selection.choice import Selection
from lola_flwr.server.selection.history import BlockHistory
from lola_flwr.server.selection.importance import Trials
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

__all__ = [
    "NEEDS_RESPONSE",
    "SELECTORS",
    "BlockHistory",
    "BlockSelector",
    "BoundedStaleness",
    "ImportanceSampled",
    "LargestMoves",
    "Lisa",
    "OutlierWeighted",
    "Progressive",
    "RoundRobin",
    "Selection",
    "Trials",
    "selector_named",
]
