"""Run a legacy strategy's rounds inside a ServerApp."""

from __future__ import annotations

from flwr.common import Context
from flwr.server import Grid, LegacyContext, ServerConfig
from flwr.server.workflow import DefaultWorkflow

from lola_flwr.strategies import LegacyGrid, LoLaDeft


def run_rounds(
    grid: Grid,
    context: Context,
    strategy: LoLaDeft,
    *,
    num_rounds: int,
    round_timeout_s: float = 3600.0,
) -> None:
    """Run a strategy's rounds inside a ServerApp.

    Parameters
    ----------
    grid, context
        What Flower hands to the ServerApp's main function.
    strategy
        The strategy.
    num_rounds
        The run's rounds, of which a resumed run has done some before.
    round_timeout_s
        How long to wait at most for the devices of a round.
    """
    arrivals = LegacyGrid(
        grid,
        wait_s=lambda *there: min(round_timeout_s, strategy.wait_s(*there)),
    )
    strategy.arrivals = arrivals
    left = num_rounds - strategy.coordinator.server_round
    config = ServerConfig(num_rounds=left)
    try:
        DefaultWorkflow()(
            arrivals, LegacyContext(context, config=config, strategy=strategy)
        )
    finally:
        arrivals.end()
