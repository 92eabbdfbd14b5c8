"""Flower clients: what runs on a device.

A name is imported when it is asked for. In deployment every message starts a new client
process, and a second in which it imports what another process needs (PyTorch, where a
resident worker trains) is a second of the round.
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lola_flwr.clients.assigned_block import AssignedBlock, block_mod
    from lola_flwr.clients.block_client import BlockClient
    from lola_flwr.clients.client_app import LoLaClient
    from lola_flwr.clients.held_copies import held_mod
    from lola_flwr.clients.node import node_partition, node_profile
    from lola_flwr.clients.profiles import profile_mod, report_profile
    from lola_flwr.clients.project_app import ClientApp, project_mod
    from lola_flwr.device.block_device import BlockDevice
    from lola_flwr.device.loss_history import HistoryBatches
    from lola_flwr.device.sampler_options import Coreset, Entropy, History
    from lola_flwr.device.sampling import ChosenBatches

__all__ = [
    "AssignedBlock",
    "BlockClient",
    "BlockDevice",
    "ChosenBatches",
    "ClientApp",
    "Coreset",
    "Entropy",
    "History",
    "HistoryBatches",
    "LoLaClient",
    "block_mod",
    "held_mod",
    "node_partition",
    "node_profile",
    "profile_mod",
    "project_mod",
    "report_profile",
]


@cache
def _homes() -> dict[str, str | None]:
    """Return which module each name is in, as the imports above say."""
    tree = ast.parse(inspect.getsource(sys.modules[__name__]))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports for alias in node.names}


def __getattr__(name: str) -> object:
    home = _homes().get(name) if name in __all__ else None
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
