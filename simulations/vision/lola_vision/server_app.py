"""The app's server side: strategy, evaluation on held-out images, a last line."""

from __future__ import annotations

from collections.abc import Sequence
from logging import ERROR, INFO

import numpy as np
import torch
from flwr.app import MetricRecord
from flwr.common import Context, NDArrays, Scalar
from flwr.common.logger import log
from flwr.server import Grid, ServerApp
from numpy.typing import NDArray

from lola_flwr.errors import UserError
from lola_flwr.model.loading import load_values
from lola_flwr.run.directory import describe_run, run_directory, say_where
from lola_flwr.run.records import Record
from lola_flwr.run.round_log import RoundLog, read_rounds, require_training
from lola_flwr.strategies import LoLaDeft, message
from lola_flwr.strategies.run_rounds import run_rounds
from lola_vision.config import VisionConfig
from lola_vision.model import build, images, make_coordinator

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the app; a user's mistake is logged as one line."""
    try:
        train(grid, context)
    except UserError as error:
        log(ERROR, "error: %s", str(error))
        raise


def train(grid: Grid, context: Context) -> None:
    """Train the configured model on the configured images."""
    config = VisionConfig.from_run_config(context.run_config)
    held_out = images(config)[1]
    model, partition, _ = build(config)

    def evaluate(values: Sequence[NDArray[np.floating]]) -> dict[str, float]:
        load_values(model, partition.trainable, values)
        model.eval()
        with torch.inference_mode():
            output = model(**held_out.batch(np.arange(len(held_out.labels))))
        correct = output.logits.argmax(dim=1).numpy() == held_out.labels
        return {"loss": output.loss.item(), "accuracy": float(correct.mean())}

    directory = run_directory(config.output_dir, context.run_id)
    log_file = RoundLog(directory / "rounds.jsonl")
    describe_run(directory, app="lola-vision", config=config.to_run_config())

    def on_round(record: Record) -> None:
        log_file.append(record)

    coordinator = make_coordinator(config)
    if config.interface == "legacy":

        def legacy_evaluate(
            server_round: int, values: NDArrays, _: dict[str, Scalar]
        ) -> tuple[float, dict[str, Scalar]]:
            metrics = evaluate(values)
            return metrics.pop("loss"), {**metrics}

        legacy = LoLaDeft(coordinator, evaluate_fn=legacy_evaluate, on_round=on_round)
        run_rounds(grid, context, legacy, num_rounds=config.rounds)
    else:
        strategy = message.LoLaDeft(coordinator, on_round=on_round)
        strategy.start(
            grid,
            strategy.initial_arrays(),
            num_rounds=config.rounds,
            evaluate_fn=lambda server_round, arrays: MetricRecord(
                {**evaluate(arrays.to_numpy_ndarrays())}
            ),
        )
    say_where(log_file.path)
    records = read_rounds(log_file.path)
    require_training(records)
    log(INFO, "%s", records[-1].final_line())
