"""An app's server side: the rounds, what is kept of them, and the trained model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from logging import ERROR, INFO, WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.common import Context
from flwr.common.logger import log
from flwr.server import Grid, ServerApp
from numpy.typing import NDArray

from lola_flwr.app.batches import batches_told
from lola_flwr.app.config import AppConfig
from lola_flwr.app.model import WholeModel
from lola_flwr.app.rounds import OnRound, run_d2ft, run_legacy, run_message
from lola_flwr.app.target import (
    TargetReached,
    check_target,
    spent_words,
    was_reached,
)
from lola_flwr.device.store import run_store
from lola_flwr.errors import UserError
from lola_flwr.machine.files import filling
from lola_flwr.model.adapter_trial import check_merging, check_saving
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.saved_adapters import merge, save_model
from lola_flwr.run.directory import RunDirectory, describe_run, run_directory, told
from lola_flwr.run.records import Record
from lola_flwr.run.round_log import read_rounds, require_training
from lola_flwr.run.target import Target
from lola_flwr.run.tracking import tracking
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.spread.trainer import SpreadTrainer


def server_app(fine_tune: Callable[[Grid, Context], None]) -> ServerApp:
    """Make an app's server side; a user's mistake is logged as one line.

    Parameters
    ----------
    fine_tune
        Runs the app.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            fine_tune(grid, context)
        except UserError as error:
            log(ERROR, "error: %s", str(error))
            raise
        finally:
            # Simulated devices are on this host; no other run has a use for what they
            # kept.
            shutil.rmtree(run_store(context.run_id), ignore_errors=True)

    return app


def _says_nothing(model: Any, directory: Path) -> str:
    return ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """What an app trains.

    Parameters
    ----------
    app
        The app's name.
    whole, tokenizer
        The model that is evaluated, by which its values are overwritten, and saved; and
        what is saved with it.
    partition
        The blocks of the one that is trained.
    data
        Digest of what it is trained and evaluated on.
    evaluate
        Returns the loss and the metrics of the whole model as it is.
    keep_beside
        Keeps what more belongs to a saved model, and returns what to tell the user
        (default: nothing does).
    """

    app: str
    whole: WholeModel
    tokenizer: Any
    partition: BlockPartition
    data: str
    evaluate: Callable[[], dict[str, float]]
    keep_beside: Callable[[Any, Path], str] = _says_nothing


def try_saving(
    config: AppConfig, model: Any, load_base: Callable[[], Any], few: Batch
) -> None:
    """Try now what would else be refused after all the training.

    Parameters
    ----------
    config
        Run configuration.
    model
        The model.
    load_base
        Gives it anew as it was before adapters.
    few
        An example or more.
    """
    if config.save_model:
        check_saving(model, load_base, few)
    if config.save_merged:
        check_merging(model, few)


def train(
    grid: Grid,
    context: Context,
    config: AppConfig,
    subject: Subject,
    trained: Coordinator | SpreadTrainer,
) -> None:
    """Run the rounds and keep what comes of them, the model included if asked for."""
    partition = subject.partition
    target = Target.parse(config.target) if config.target else None

    def evaluate(
        server_round: int, values: Sequence[NDArray[np.floating]]
    ) -> dict[str, float] | None:
        if server_round % config.eval_every and server_round != config.rounds:
            return None
        named = dict(zip(partition.trainable, values, strict=True))
        subject.whole.load(partition, named)
        metrics = subject.evaluate()
        check_target(target, server_round, metrics)
        return metrics

    directory = run_directory(config.output_dir, context.run_id)
    trackers = config.trackers.split()
    every = config.checkpoint_every
    if isinstance(trained, SpreadTrainer):
        # For a checkpoint devices return all that they hold.
        every = max(every, trained.return_every)
    with (
        RunDirectory(
            directory,
            trained,
            configuration=config.results_depend_on(),
            data=subject.data,
            other_data=config.other_data,
            keep=config.keep_checkpoints,
            every=every,
            last=config.rounds,
        ) as files,
        tracking(trackers, directory, config.to_run_config()) as track,
    ):
        run_config = config.to_run_config()
        log(INFO, "%s", batches_told(run_config))
        describe_run(
            directory,
            app=subject.app,
            config=run_config,
            server_round=trained.server_round,
        )

        def on_round(record: Record) -> None:
            is_last = was_reached(target, [record])
            files.on_round(record, is_last=is_last)
            track(record)
            if is_last:
                raise TargetReached

        run: Callable[..., None] = run_message
        if isinstance(trained, SpreadTrainer):
            run = run_d2ft
        elif config.interface == "legacy":
            run = run_legacy
        each: OnRound = on_round
        if was_reached(target, read_rounds(files.log.path)):
            log(INFO, "target %s was reached before", target)
        else:
            with suppress(TargetReached):
                run(grid, context, config, trained, evaluate, each)
    records = read_rounds(files.log.path)
    require_training(records)
    log(INFO, "%s%s", records[-1].final_line(), spent_words(target, records))
    if config.save_model or config.save_merged:
        subject.whole.load(partition, trained.values())
        _save(config, subject, directory)


def _save(config: AppConfig, subject: Subject, directory: Path) -> None:
    model, tokenizer = subject.whole.model, subject.tokenizer
    if config.save_model:
        with filling(directory / "model") as saved:
            save_model(model, saved)
            tokenizer.save_pretrained(saved)
            said = subject.keep_beside(model, saved)
        log(INFO, "model written to %s/model", told(directory))
        if said:
            log(WARNING, "%s", said)
    if config.save_merged:
        with filling(directory / "merged") as saved:
            merge(model).save_pretrained(saved)
            tokenizer.save_pretrained(saved)
        log(INFO, "merged model written to %s/merged", told(directory))
