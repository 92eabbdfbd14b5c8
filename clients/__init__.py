"""Flower clients: what runs on a device."""

from lola_flwr.clients.assigned_block import AssignedBlock, block_mod
from lola_flwr.clients.block_client import BlockClient
from lola_flwr.clients.client_app import LoLaClient
from lola_flwr.clients.device import BlockDevice
from lola_flwr.clients.profiles import node_profile, profile_mod, report_profile

__all__ = [
    "AssignedBlock",
    "BlockClient",
    "BlockDevice",
    "LoLaClient",
    "block_mod",
    "node_profile",
    "profile_mod",
    "report_profile",
]
