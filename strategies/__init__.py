"""Flower strategies: thin adapters over one loop."""

from lola_flwr.strategies.deadline_grid import DeadlineGrid, LegacyGrid
from lola_flwr.strategies.lola_deft import LoLaDeft
from lola_flwr.strategies.rounds import Waits

__all__ = ["DeadlineGrid", "LegacyGrid", "LoLaDeft", "Waits"]
