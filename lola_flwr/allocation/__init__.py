"""Which device computes which block, with which share of the band.

State an `AllocationProblem` and hand it to `allocate`. Source of the problem, of CRUNCH
and of JBBA: Wu, Chen, Huang, "Resource Management for Low-latency Cooperative
Fine-tuning of Foundation Models at the Network Edge", arXiv:2407.09873.
"""

from lola_flwr.allocation.allocators import (
    ALLOCATORS,
    ENERGY_ALLOCATORS,
    IN_TURN_ALLOCATORS,
    RANDOM_ALLOCATORS,
    UNIFORM_POWER_ALLOCATORS,
    Allocator,
    allocate,
    find_allocator,
)
from lola_flwr.allocation.band import PowerLimitedUplink
from lola_flwr.allocation.batches import (
    BatchProblem,
    OwnBatches,
    Tried,
    best_candidate,
    own_batches,
    progress,
)
from lola_flwr.allocation.broadcast import (
    Broadcast,
    Heard,
    allocate_broadcast,
    settled,
)
from lola_flwr.allocation.codec_levels import refine_payloads
from lola_flwr.allocation.further import FurtherProblem, further_blocks
from lola_flwr.allocation.inclusion import (
    drawn_components,
    inclusion_probabilities,
    sampling_noise,
)
from lola_flwr.allocation.joules import EnergyCosts
from lola_flwr.allocation.problem import AllocationProblem, Participation, RoundMode
from lola_flwr.allocation.ranks import RankProblem, kept_progress, own_ranks
from lola_flwr.allocation.rotation import rotate
from lola_flwr.allocation.sharing import share_blocks
from lola_flwr.allocation.solution import Allocation, InfeasibleAllocation
from lola_flwr.allocation.spans import SpanCover, SpanProblem, solve_spans

__all__ = [
    "ALLOCATORS",
    "ENERGY_ALLOCATORS",
    "IN_TURN_ALLOCATORS",
    "RANDOM_ALLOCATORS",
    "UNIFORM_POWER_ALLOCATORS",
    "Allocation",
    "AllocationProblem",
    "Allocator",
    "BatchProblem",
    "Broadcast",
    "EnergyCosts",
    "FurtherProblem",
    "Heard",
    "InfeasibleAllocation",
    "OwnBatches",
    "Participation",
    "PowerLimitedUplink",
    "RankProblem",
    "RoundMode",
    "SpanCover",
    "SpanProblem",
    "Tried",
    "allocate",
    "allocate_broadcast",
    "best_candidate",
    "drawn_components",
    "find_allocator",
    "further_blocks",
    "inclusion_probabilities",
    "kept_progress",
    "own_batches",
    "own_ranks",
    "progress",
    "refine_payloads",
    "rotate",
    "sampling_noise",
    "settled",
    "share_blocks",
    "solve_spans",
]
