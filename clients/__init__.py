"""Flower clients: what runs on a device."""

from lola_flwr.clients.block_client import BlockClient

__all__ = ["BlockClient"]
