"""Flower clients: what runs on a device.

A name is imported when it is asked for. In deployment every message starts a new client
process, and a second in which it imports what another process needs (PyTorch, where a
resident worker trains) is a second of the round.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lola_flwr.clients.assigned_block import AssignedBlock, block_mod
    from lola_flwr.clients.block_client import BlockClient
    from lola_flwr.clients.client_app import LoLaClient
    from lola_flwr.clients.held_copies import held_mod
    from lola_flwr.clients.node import node_partition, node_profile
    from lola_flwr.clients.profiles import profile_mod, report_profile
    from lola_flwr.device.block_device import BlockDevice
    from lola_flwr.device.sampling import ChosenBatches

__all__ = [
    "AssignedBlock",
    "BlockClient",
    "BlockDevice",
    "ChosenBatches",
    "LoLaClient",
    "block_mod",
    "held_mod",
    "node_partition",
    "node_profile",
    "profile_mod",
    "report_profile",
]

_MODULES = {
    "AssignedBlock": "lola_flwr.clients.assigned_block",
    "BlockClient": "lola_flwr.clients.block_client",
    "BlockDevice": "lola_flwr.device.block_device",
    "ChosenBatches": "lola_flwr.device.sampling",
    "LoLaClient": "lola_flwr.clients.client_app",
    "block_mod": "lola_flwr.clients.assigned_block",
    "held_mod": "lola_flwr.clients.held_copies",
    "node_partition": "lola_flwr.clients.node",
    "node_profile": "lola_flwr.clients.node",
    "profile_mod": "lola_flwr.clients.profiles",
    "report_profile": "lola_flwr.clients.profiles",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
