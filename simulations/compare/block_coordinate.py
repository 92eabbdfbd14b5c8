"""Federated block coordinate descent: a device trains one block by several own steps.

Sources: FedCyBGD, arXiv:2406.11187, in which devices train one after the other, each a
block; and the rounds that ParaBlock, arXiv:2511.19959, improves upon, in which all
devices train a block each at once, and which it overlaps: a round's values are uploaded
while the next is computed. Read were their abstracts. Departures: blocks go round by
number; FedCyBGD's compressed download is left out, since downloads are free to all
methods here; so is ParaBlock's correction of values that are a round old.
"""

from __future__ import annotations

from lola_flwr.arrays import Float64Array
from simulations.compare.contender import Contender, Fleet, Part


def one_block_in_turn(fleet: Fleet) -> Contender:
    """Return rounds of one device and one block, both in turn (FedCyBGD)."""
    parts = _block_parts(fleet)

    def turn(server_round: int, _: Float64Array) -> dict[int, Part]:
        number = server_round - 1
        return {number % len(fleet.profiles): parts[number % len(parts)]}

    return Contender(parts=turn)


def a_block_each(fleet: Fleet) -> Contender:
    """Return rounds in which all devices train a block each, another every round."""
    parts = _block_parts(fleet)
    return Contender(
        parts=lambda server_round, _: {
            device: parts[(device + server_round - 1) % len(parts)]
            for device in range(len(fleet.profiles))
        },
        overlaps=fleet.method.overlaps,
    )


def _block_parts(fleet: Fleet) -> list[Part]:
    blocks = range(fleet.partition.num_blocks)
    return [fleet.part_from(block, block + 1) for block in blocks]
