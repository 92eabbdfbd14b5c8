"""Run a Flower app in simulation, and leave nothing behind."""

from lola_flwr.simulation.finished import FinishedRun
from lola_flwr.simulation.runs import SuperLink, own_superlink, run_app

__all__ = ["FinishedRun", "SuperLink", "own_superlink", "run_app"]
