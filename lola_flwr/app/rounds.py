"""A run's rounds under either of Flower's interfaces, and D2FT's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.common import Context, NDArrays, Scalar
from flwr.server import Grid
from numpy.typing import NDArray

from lola_flwr.app.config import AppConfig
from lola_flwr.run.records import Record
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.spread.trainer import SpreadTrainer
from lola_flwr.strategies import LoLaDeft, message
from lola_flwr.strategies.d2ft import D2FT
from lola_flwr.strategies.run_rounds import run_rounds

# The model's loss and metrics after a round; None in rounds that are not evaluated.
Evaluate = Callable[[int, Sequence[NDArray[np.floating]]], dict[str, float] | None]
OnRound = Callable[[Record], None]


def run_legacy(
    grid: Grid,
    context: Context,
    config: AppConfig,
    coordinator: Coordinator,
    evaluate: Evaluate,
    on_round: OnRound,
) -> None:
    """Run the rounds through ``flwr.server.strategy.Strategy``."""

    def evaluate_fn(
        server_round: int, values: NDArrays, _: dict[str, Scalar]
    ) -> tuple[float, dict[str, Scalar]] | None:
        metrics = evaluate(server_round, values)
        return None if metrics is None else (metrics.pop("loss"), {**metrics})

    strategy = LoLaDeft(
        coordinator,
        min_available_clients=config.num_devices or None,
        evaluate_fn=evaluate_fn,
        on_round=on_round,
    )
    run_rounds(
        grid,
        context,
        strategy,
        num_rounds=config.rounds,
        round_timeout_s=config.round_timeout_s,
    )


def run_message(
    grid: Grid,
    _: Context,
    config: AppConfig,
    coordinator: Coordinator,
    evaluate: Evaluate,
    on_round: OnRound,
) -> None:
    """Run the rounds through ``flwr.serverapp.strategy.Strategy``."""
    strategy = message.LoLaDeft(
        coordinator,
        min_available_nodes=config.num_devices or None,
        on_round=on_round,
    )
    _start(strategy, grid, config, evaluate)


def run_d2ft(
    grid: Grid,
    _: Context,
    config: AppConfig,
    trainer: SpreadTrainer,
    evaluate: Evaluate,
    on_round: OnRound,
) -> None:
    """Take D2FT's steps, each of which is a round of Flower's."""
    strategy = D2FT(
        trainer,
        min_available_nodes=config.num_devices or 2,
        evaluate_every=config.eval_every,
        on_round=on_round,
    )
    _start(strategy, grid, config, evaluate)


def _start(
    strategy: message.LoLaDeft | D2FT,
    grid: Grid,
    config: AppConfig,
    evaluate: Evaluate,
) -> None:
    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        metrics = evaluate(server_round, arrays.to_numpy_ndarrays())
        return None if metrics is None else MetricRecord({**metrics})

    strategy.start(
        grid,
        strategy.initial_arrays(),
        num_rounds=config.rounds,
        timeout=config.round_timeout_s,
        evaluate_fn=evaluate_fn,
    )
