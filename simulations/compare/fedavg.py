"""FedAvg: every device trains everything that is trained, and the server averages.

Source: McMahan et al., arXiv:1602.05629; with LoRA it is FedIT (Zhang et al.,
arXiv:2305.05644), which averages the two matrices of each adapter by themselves.
"""

from __future__ import annotations

from simulations.compare.contender import Contender, Fleet


def fedavg(fleet: Fleet) -> Contender:
    """Return FedAvg's rounds."""
    part = fleet.part_from(0)
    return Contender(parts=lambda *_: dict.fromkeys(range(len(fleet.profiles)), part))
