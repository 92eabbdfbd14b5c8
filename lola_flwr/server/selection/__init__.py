"""Which blocks are trained in a round that does not train all of them."""

from lola_flwr.server.selection.by_name import NEEDS_RESPONSE, SELECTORS, selector_named
from lola_flwr.server.selection.chooser import BlockChooser, Selection
from lola_flwr.server.selection.history import BlockHistory
from lola_flwr.server.selection.importance import Trials
from lola_flwr.server.selection.latency_target import most_valuable_blocks
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
    "BlockChooser",
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
    "most_valuable_blocks",
    "selector_named",
]
