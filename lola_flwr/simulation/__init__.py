"""Run a Flower app in the simulation engine, and leave nothing behind."""

from lola_flwr.simulation.runs import FinishedRun, SuperLink, own_superlink, run_app

__all__ = ["FinishedRun", "SuperLink", "own_superlink", "run_app"]
