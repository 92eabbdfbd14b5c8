"""The app's server side: data, model, strategy, and the summary at the end."""

from __future__ import annotations

from logging import INFO
from typing import Any

import numpy as np
import torch
from flwr.common import Context
from flwr.common.logger import log
from flwr.server import Grid

from lola_flwr.app.config import LolaDeftConfig
from lola_flwr.app.d2ft import make_trainer
from lola_flwr.app.methods import make_coordinator, own_examples_of, response_of
from lola_flwr.app.model import begin, whole_model
from lola_flwr.app.server import Subject, server_app, train, try_saving
from lola_flwr.arrays import IntArray
from lola_flwr.model.backprop import Batch
from lola_flwr.model.saved_adapters import keep_class_names
from lola_flwr.model.stored_base import evaluation_mode
from lola_flwr.run.digest import data_digest
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.spread.trainer import SpreadTrainer
from lola_glue.config import D2ftConfig, GlueConfig, SampledConfig
from lola_glue.costs import load_base, load_model, model_blocks, model_costs
from lola_glue.device import split
from lola_glue.scoring import score
from lola_glue.tasks import Examples, Task, load_task
from lola_glue.text import make_batch

_EVALUATION_BATCH = 128


def fine_tune(grid: Grid, context: Context) -> None:
    """Fine-tune the configured model on the configured task."""
    config = GlueConfig.from_run_config(context.run_config)
    task, train_examples, dev = load_task(
        config.task, config.data_dir, seed=config.seed
    )
    if config.num_devices:
        # Each device works out its own part: a split that cannot be is seen here first.
        split(config, train_examples, config.num_devices)
    model, tokenizer = load_model(config, task)
    said = begin(config, model)
    if said:
        log(INFO, "%s", said)
    partition = model_blocks(config, model)
    few = make_batch(
        train_examples, np.arange(1), tokenizer, max_length=config.max_length
    )
    whole = whole_model(config, model, lambda: load_base(config, task)[0])
    try_saving(config, whole.model, lambda: load_base(config, task)[0], few)

    def metrics_of(some: Any, examples: Examples) -> dict[str, float]:
        return evaluate_model(some, tokenizer, task, examples, config.max_length)

    def batch_of(drawn: IntArray) -> Batch:
        return make_batch(
            train_examples, drawn, tokenizer, max_length=config.max_length
        )

    def mean_loss(drawn: IntArray) -> float:
        return metrics_of(model, train_examples.at(drawn))["loss"]

    trained: Coordinator | SpreadTrainer
    if isinstance(config, SampledConfig):
        response = None
        if isinstance(config, LolaDeftConfig):
            response = response_of(
                config, model, partition, len(train_examples), mean_loss
            )
        trained = make_coordinator(
            config,
            model,
            partition,
            costs=model_costs(config, model),
            response=response,
            own_examples=own_examples_of(
                config, model, partition, len(train_examples), batch_of
            ),
        )
    elif isinstance(config, D2ftConfig):
        trained = make_trainer(config, model, partition)
    subject = Subject(
        app="lola-glue",
        whole=whole,
        tokenizer=tokenizer,
        partition=partition,
        data=data_digest((*train_examples.rows(), *dev.rows())),
        evaluate=lambda: metrics_of(whole.model, dev),
        keep_beside=keep_class_names,
    )
    train(grid, context, config, subject, trained)


def evaluate_model(
    model: Any, tokenizer: Any, task: Task, examples: Examples, max_length: int
) -> dict[str, float]:
    """Return the mean loss and the task's metrics on some examples."""
    # Sentences of like length share a batch, so that little padding is computed.
    lengths = [len(first) + len(second or "") for first, second in examples.sentences]
    order = np.argsort(lengths, kind="stable")
    evaluation_mode(model)
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


app = server_app(fine_tune)
