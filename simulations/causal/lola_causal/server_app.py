"""The app's server side: data, model, strategy, and the summary at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from logging import INFO
from typing import Any

import torch
from flwr.common import Context
from flwr.common.logger import log
from flwr.server import Grid
from torch.nn.functional import cross_entropy

from lola_causal.config import CausalConfig, D2ftConfig
from lola_causal.device import split
from lola_causal.model import causal_costs, causal_loss, load_base, load_model
from lola_causal.records import load_records
from lola_causal.sequences import (
    IGNORED,
    Tokens,
    batches_of,
    encode,
    num_learned,
    padded,
)
from lola_flwr.app.config import LolaDeftConfig, UpdatesConfig
from lola_flwr.app.d2ft import make_trainer
from lola_flwr.app.methods import make_coordinator, own_examples_of, response_of
from lola_flwr.app.model import begin, model_blocks, whole_model
from lola_flwr.app.server import Subject, server_app, train, try_saving
from lola_flwr.arrays import IntArray
from lola_flwr.model.backprop import Batch
from lola_flwr.model.stored_base import evaluation_mode
from lola_flwr.run.digest import data_digest
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.spread.trainer import SpreadTrainer

# Where devices have batches of their own.
_EVALUATION_BATCH = 32


def fine_tune(grid: Grid, context: Context) -> None:
    """Fine-tune the configured model on the configured data."""
    config = CausalConfig.from_run_config(context.run_config)
    records = load_records(config.data, config.eval_data, seed=config.seed)
    model, tokenizer = load_model(config)
    said = begin(config, model)
    if said:
        log(INFO, "%s", said)
    sequences, held_out = (
        encode(part, tokenizer, max_length=config.max_length, model_name=config.model)
        for part in records
    )
    if config.num_devices:
        # Each device works out its own part: a split that cannot be is seen here first.
        split(len(sequences), config.num_devices, config.seed)
    partition = model_blocks(config, model)
    few = {**padded(sequences[:1], tokenizer.pad_token_id)}
    whole = whole_model(config, model, lambda: load_base(config)[0])
    try_saving(config, whole.model, lambda: load_base(config)[0], few)

    batch_size = config.batch_size
    if isinstance(batch_size, str):
        batch_size = _EVALUATION_BATCH

    def metrics_of(some: Any, tokens: Sequence[Tokens]) -> dict[str, float]:
        return evaluate_model(some, tokenizer, tokens, batch_size)

    def batch_of(drawn: IntArray) -> Batch:
        return padded([sequences[index] for index in drawn], tokenizer.pad_token_id)

    def mean_loss(drawn: IntArray) -> float:
        return metrics_of(model, [sequences[index] for index in drawn])["loss"]

    trained: Coordinator | SpreadTrainer
    if isinstance(config, UpdatesConfig):
        response = None
        if isinstance(config, LolaDeftConfig):
            response = response_of(config, model, partition, len(sequences), mean_loss)
        trained = make_coordinator(
            config,
            model,
            partition,
            costs=causal_costs(config, model),
            example_weight=config.max_length,
            response=response,
            own_examples=own_examples_of(
                config,
                model,
                partition,
                len(sequences),
                batch_of,
                loss_function=causal_loss,
                batch_weight=num_learned,
            ),
        )
    elif isinstance(config, D2ftConfig):
        trained = make_trainer(
            config, model, partition, example_weight=config.max_length
        )
    subject = Subject(
        app="lola-causal",
        whole=whole,
        tokenizer=tokenizer,
        partition=partition,
        data=data_digest(
            [record.prompt, record.completion, record.messages]
            for part in records
            for record in part
        ),
        evaluate=lambda: metrics_of(whole.model, held_out),
    )
    train(grid, context, config, subject, trained)


def evaluate_model(
    model: Any, tokenizer: Any, sequences: Sequence[Tokens], batch_size: int
) -> dict[str, float]:
    """Return mean loss, perplexity and exact match of completions, given the prompts.

    A completion matches where each of its tokens, its end included, is the likeliest
    one after those before it: it is then what the model writes if it takes the
    likeliest token each time.
    """
    evaluation_mode(model)
    total_loss, num_tokens, num_right = 0.0, 0, 0
    with torch.inference_mode():
        for batch in batches_of(sequences, batch_size, tokenizer.pad_token_id):
            labels = batch["labels"][:, 1:]
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            total_loss += cross_entropy(
                logits.flatten(0, 1),
                labels.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            ).item()
            learned = labels != IGNORED
            num_tokens += int(learned.sum())
            right = (logits.argmax(-1) == labels) | ~learned
            num_right += int(right.all(dim=1).sum())
    loss = total_loss / num_tokens
    return {
        "loss": loss,
        # No run ends for a number that is too large.
        "perplexity": math.exp(min(loss, 700.0)),
        "exact_match": num_right / len(sequences),
    }


app = server_app(fine_tune)
