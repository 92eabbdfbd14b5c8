"""Depth-limited LoRA: each device trains the adapters of as many layers as suit it.

Source: FedQuad, arXiv:2506.01001, and LEGEND: the layers nearest the output, as many as
a device has memory and speed for; each adapter's mean is over those that trained it.
Read were their abstracts. Departures: FedQuad chooses depth together with quantised
activations, and LEGEND gives layers nearer the output larger ranks; here the depth is
the greatest with which a device computes no longer than the median device does for all
layers.
"""

from __future__ import annotations

import numpy as np

from simulations.compare.contender import Contender, Fleet


def depth_limited(fleet: Fleet) -> Contender:
    """Return rounds in which a device trains all blocks from one of its own on."""
    firsts = first_blocks(fleet)
    parts = {device: fleet.part_from(first) for device, first in enumerate(firsts)}
    return Contender(parts=lambda *_: parts)


def first_blocks(fleet: Fleet) -> list[int]:
    """Return the first block that each device trains; the last where none suits it."""
    last = fleet.partition.num_blocks - 1
    seconds, fits = [], []
    for profile in fleet.profiles:
        spans = [fleet.costs.joined([range(b, last + 1)]) for b in range(last + 1)]
        seconds.append(
            [costs.flops[b] / profile.flops_per_s for b, costs in enumerate(spans)]
        )
        fits.append(
            [
                costs.required_bytes([profile])[0, b] <= profile.memory_bytes
                for b, costs in enumerate(spans)
            ]
        )
    limit_s = np.median([of_device[0] for of_device in seconds])
    suits = (np.array(seconds) <= limit_s) & np.array(fits)  # [K, N]
    return [int(np.argmax(row)) if row.any() else last for row in suits]
