"""The app's server side: data, model, strategy, and the summary at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from logging import ERROR, INFO, WARNING
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.common import Context, NDArrays, Scalar
from flwr.common.logger import log
from flwr.server import Grid, ServerApp
from numpy.typing import NDArray

from lola_flwr.device.store import run_store
from lola_flwr.errors import UserError
from lola_flwr.machine.files import filling
from lola_flwr.model.adapter_trial import check_merging, check_saving
from lola_flwr.model.backprop import Batch
from lola_flwr.model.loading import load_values
from lola_flwr.model.saved_adapters import keep_class_names, merge, save_model
from lola_flwr.run.directory import RunDirectory, describe_run, run_directory
from lola_flwr.run.records import Record
from lola_flwr.run.round_log import read_rounds, require_training
from lola_flwr.run.tracking import tracking
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.spread.trainer import SpreadTrainer
from lola_flwr.strategies import LoLaDeft, message
from lola_flwr.strategies.d2ft import D2FT
from lola_flwr.strategies.run_rounds import run_rounds
from lola_glue.config import D2ftConfig, GlueConfig, LolaDeftConfig, UpdatesConfig
from lola_glue.costs import load_base, load_model, model_blocks
from lola_glue.device import split
from lola_glue.methods import make_coordinator, make_trainer, response_of
from lola_glue.scoring import score
from lola_glue.tasks import Examples, Task, load_task
from lola_glue.text import make_batch

_EVALUATION_BATCH = 128

# The model's loss and metrics after a round; None in rounds that are not evaluated.
Evaluate = Callable[[int, Sequence[NDArray[np.floating]]], dict[str, float] | None]
OnRound = Callable[[Record], None]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the app; a user's mistake is logged as one line."""
    try:
        fine_tune(grid, context)
    except UserError as error:
        log(ERROR, "error: %s", str(error))
        raise
    finally:
        # Simulated devices are on this host; no other run has a use for what they kept.
        shutil.rmtree(run_store(context.run_id), ignore_errors=True)


def fine_tune(grid: Grid, context: Context) -> None:
    """Fine-tune the configured model on the configured task."""
    config = GlueConfig.from_run_config(context.run_config)
    task, train, dev = load_task(config.task, config.data_dir, seed=config.seed)
    if config.num_devices:
        # Each device works out its own part: a split that cannot be is seen here first.
        split(config, train, config.num_devices)
    model, tokenizer = load_model(config, task)
    partition = model_blocks(config, model)
    few = make_batch(train, np.arange(1), tokenizer, max_length=config.max_length)
    try_saving(config, task, model, few)

    def mean_loss(examples: Examples) -> float:
        return evaluate_model(model, tokenizer, task, examples, config.max_length)[
            "loss"
        ]

    trained: Coordinator | SpreadTrainer
    if isinstance(config, UpdatesConfig):
        response = None
        if isinstance(config, LolaDeftConfig):
            response = response_of(config, model, partition, train, mean_loss)
        trained = make_coordinator(config, model, partition, response=response)
    elif isinstance(config, D2ftConfig):
        trained = make_trainer(config, model, partition)

    def evaluate(
        server_round: int, values: Sequence[NDArray[np.floating]]
    ) -> dict[str, float] | None:
        if server_round % config.eval_every and server_round != config.rounds:
            return None
        load_values(model, partition.trainable, values)
        return evaluate_model(model, tokenizer, task, dev, config.max_length)

    directory = run_directory(config.output_dir, context.run_id)
    trackers = config.trackers.split()
    with (
        RunDirectory(
            directory,
            trained,
            configuration=config.results_depend_on(),
            keep=config.keep_checkpoints,
            every=config.checkpoint_every,
        ) as files,
        tracking(trackers, directory, config.to_run_config()) as track,
    ):
        describe_run(directory, app="lola-glue", config=config.to_run_config())

        def on_round(record: Record) -> None:
            files.on_round(record)
            track(record)

        if isinstance(trained, SpreadTrainer):
            run_d2ft(grid, config, trained, evaluate, on_round)
        elif config.interface == "legacy":
            run_legacy(grid, context, config, trained, evaluate, on_round)
        else:
            run_message(grid, config, trained, evaluate, on_round)
    records = read_rounds(files.log.path)
    require_training(records)
    log(INFO, "%s", records[-1].final_line())
    if config.save_model or config.save_merged:
        values = trained.values()
        load_values(
            model, partition.trainable, [values[n] for n in partition.trainable]
        )
        if config.save_model:
            with filling(directory / "model") as saved:
                save_model(model, saved)
                tokenizer.save_pretrained(saved)
                said = keep_class_names(model, saved)
            log(INFO, "model written to %s", directory / "model")
            if said:
                log(WARNING, "%s", said)
        if config.save_merged:
            with filling(directory / "merged") as saved:
                merge(model).save_pretrained(saved)
                tokenizer.save_pretrained(saved)
            log(INFO, "merged model written to %s", directory / "merged")


def try_saving(config: GlueConfig, task: Task, model: Any, few: Batch) -> None:
    """Try now what would else be refused after all the training."""
    if config.save_model:
        check_saving(model, lambda: load_base(config, task)[0], few)
    if config.save_merged:
        check_merging(model, few)


def run_legacy(
    grid: Grid,
    context: Context,
    config: GlueConfig,
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
    config: GlueConfig,
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
    config: GlueConfig,
    trainer: SpreadTrainer,
    evaluate: Evaluate,
    on_round: OnRound,
) -> None:
    """Take D2FT's steps, each of which is a round of Flower's."""
    strategy = D2FT(
        trainer, min_available_nodes=config.num_devices or 2, on_round=on_round
    )
    _start(strategy, grid, config, evaluate)


def _start(
    strategy: message.LoLaDeft | D2FT,
    grid: Grid,
    config: GlueConfig,
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


def evaluate_model(
    model: Any, tokenizer: Any, task: Task, examples: Examples, max_length: int
) -> dict[str, float]:
    """Return the mean loss and the task's metrics on some examples."""
    # Sentences of like length share a batch, so that little padding is computed.
    lengths = [len(first) + len(second or "") for first, second in examples.sentences]
    order = np.argsort(lengths, kind="stable")
    model.eval()
    logits = np.empty((len(order), task.num_labels), dtype=np.float32)
    total_loss = 0.0
    with torch.inference_mode():
        for start in range(0, len(order), _EVALUATION_BATCH):
            indices = order[start : start + _EVALUATION_BATCH]
            output = model(
                **make_batch(examples, indices, tokenizer, max_length=max_length)
            )
            logits[indices] = output.logits.numpy()
            total_loss += output.loss.item() * len(indices)
    return {"loss": total_loss / len(order), **score(task, logits, examples.labels)}
