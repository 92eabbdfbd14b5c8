"""Flower strategies: thin adapters over one coordinator."""

from lola_flwr.strategies.deadline_grid import DeadlineGrid, LegacyGrid
from lola_flwr.strategies.lola_deft import LoLaDeft

__all__ = ["DeadlineGrid", "LegacyGrid", "LoLaDeft"]
