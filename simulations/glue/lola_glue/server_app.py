"""The app's server side: data, model, strategy, and the summary at the end."""

from __future__ import annotations

import os
from logging import ERROR, INFO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.common import Context, NDArrays, Scalar
from flwr.common.logger import log
from flwr.server import Grid, LegacyContext, ServerApp, ServerConfig
from flwr.server.workflow import DefaultWorkflow
from lola_flwr.strategies import DeadlineGrid, LoLaDeft

from lola_flwr.allocation import RoundMode
from lola_flwr.blocks import BlockPartition
from lola_flwr.coordinator import Coordinator
from lola_flwr.errors import UserError
from lola_flwr.models import fingerprint, load_classifier, load_values
from lola_flwr.round_log import RoundLog, RoundRecord
from lola_flwr.server_optimizer import ServerOptimizer
from lola_glue.config import GlueConfig
from lola_glue.costs import model_blocks, model_costs
from lola_glue.tasks import Examples, Task, load_task, score
from lola_glue.text import make_batch

_EVALUATION_BATCH = 128

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the app; a user's mistake is logged as one line."""
    try:
        fine_tune(grid, context)
    except UserError as error:
        log(ERROR, "error: %s", error)
        raise


def fine_tune(grid: Grid, context: Context) -> None:
    """Fine-tune the configured model on the configured task."""
    config = GlueConfig.from_run_config(context.run_config)
    task, _, dev = load_task(config.task, config.data_dir, seed=config.seed)
    model, tokenizer = load_classifier(
        config.model, num_labels=task.num_labels, seed=config.seed
    )
    positions = getattr(model.config, "max_position_embeddings", config.max_length)
    if config.max_length > positions:
        raise UserError(
            f"max-length={config.max_length} exceeds the {positions} positions of "
            f"model={config.model!r}; lower it."
        )
    partition = model_blocks(config, model)
    coordinator = make_coordinator(config, model, partition)

    def evaluate(
        server_round: int, values: NDArrays, _: dict[str, Scalar]
    ) -> tuple[float, dict[str, Scalar]] | None:
        if server_round % config.eval_every and server_round != config.rounds:
            return None
        load_values(model, partition.trainable, values)
        return evaluate_model(model, tokenizer, task, dev, config.max_length)

    log_file = RoundLog(output_directory(config, context.run_id) / "rounds.jsonl")
    last: list[RoundRecord] = []

    def on_round(record: RoundRecord) -> None:
        log_file.append(record)
        last[:] = [record]

    strategy = LoLaDeft(
        coordinator,
        min_available_clients=config.num_devices or partition.num_blocks,
        evaluate_fn=evaluate,
        on_round=on_round,
    )
    DefaultWorkflow()(
        DeadlineGrid(grid, timeout_s=config.round_timeout_s),
        LegacyContext(
            context, config=ServerConfig(num_rounds=config.rounds), strategy=strategy
        ),
    )
    log(INFO, "rounds written to %s", log_file.path)
    log(INFO, "%s", final_line(last[0]))


def make_coordinator(
    config: GlueConfig, model: Any, partition: BlockPartition
) -> Coordinator:
    """Put the coordinator together for a model and a run configuration."""
    parameters = dict(model.named_parameters())
    return Coordinator(
        partition=partition,
        costs=model_costs(config, model),
        bandwidth_hz=config.bandwidth_hz,
        correct_profiles=config.correct_profiles,
        max_gradient_norm=config.max_gradient_norm,
        optimizer=ServerOptimizer(
            {name: parameters[name].numpy(force=True) for name in partition.trainable},
            optimizer=config.optimizer,
            lr=config.lr,
            linear_decay_steps=config.rounds if config.schedule == "linear" else None,
        ),
        base_fingerprint=fingerprint(model, partition.frozen),
        allocator=config.allocator,
        mode=RoundMode(
            devices_per_block=config.devices_per_block,
            # Full fine-tuning has one block, and every device trains it.
            participation=(
                "all" if config.method == "fedavg-full" else config.participation
            ),
            backups=config.backups,
        ),
        rotation_eps=config.rotation_eps,
        batch_size=config.batch_size,
        codec=config.codec,
        seed=config.seed,
    )


def evaluate_model(
    model: Any, tokenizer: Any, task: Task, examples: Examples, max_length: int
) -> tuple[float, dict[str, Scalar]]:
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
    return total_loss / len(order), dict(score(task, logits, examples.labels))


def output_directory(config: GlueConfig, run_id: int) -> Path:
    """Return where this run's files go."""
    if config.output_dir:
        return Path(config.output_dir).expanduser().absolute()
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
    return home / "lola-flwr" / str(run_id)


def final_line(record: RoundRecord) -> str:
    """Sum the run up from its last record: metrics, rounds, wireless time."""
    metrics = {name: v for name, v in record.metrics.items() if name != "loss"}
    parts = [f"{name}={value:.4f}" for name, value in metrics.items()]
    parts += [f"rounds={record.server_round}", f"wireless_s={record.wireless_s:.3f}"]
    parts += [f"loss={record.metrics['loss']:.4f}"] if "loss" in record.metrics else []
    return f"final: {' '.join(parts)}"
