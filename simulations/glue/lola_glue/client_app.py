"""The app's device side: a simulated device with its part of the training data."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.client import Client, ClientApp
from flwr.common import Context
from lola_flwr.clients import BlockClient

from lola_flwr.models import load_classifier
from lola_flwr.protocol import Assignment
from lola_flwr.randomness import rng_for
from lola_flwr.system.devices import FleetRanges, simulated_device
from lola_flwr.truncated_backprop import Batch
from lola_glue.config import GlueConfig
from lola_glue.costs import model_blocks, model_costs
from lola_glue.partitions import partition_examples
from lola_glue.tasks import Examples, Task, load_task
from lola_glue.text import make_batch

# A worker process serves many virtual devices: it holds one model and one copy of the
# data for all of them.


@lru_cache(maxsize=1)
def _model(name: str, num_labels: int, seed: int) -> tuple[Any, Any]:
    return load_classifier(name, num_labels=num_labels, seed=seed)


@lru_cache(maxsize=1)
def _training_data(task: str, data_dir: str, seed: int) -> tuple[Task, Examples]:
    loaded, train, _ = load_task(task, data_dir, seed=seed)
    return loaded, train


@lru_cache(maxsize=1)
def _parts(config: GlueConfig, num_partitions: int) -> list[npt.NDArray[np.intp]]:
    _, train = _training_data(config.task, config.data_dir, config.seed)
    return partition_examples(
        train.labels,
        num_partitions,
        partitioning=config.partitioning,
        alpha=config.dirichlet_alpha,
        seed=config.seed,
    )


def lognormal(sigma: float, rng: np.random.Generator) -> float:
    """Draw a factor around 1 whose logarithm has the standard deviation sigma."""
    return float(np.exp(sigma * rng.standard_normal()))


def client_fn(context: Context) -> Client:
    """Make the client of one simulated device."""
    config = GlueConfig.from_run_config(context.run_config)
    index = int(context.node_config["partition-id"])
    num_partitions = int(context.node_config["num-partitions"])
    profile = simulated_device(
        index,
        seed=config.seed,
        ranges=FleetRanges(snr_db=(config.snr_min_db, config.snr_max_db)),
    )
    task, train = _training_data(config.task, config.data_dir, config.seed)
    model, tokenizer = _model(config.model, task.num_labels, config.seed)

    def draw_batch(server_round: int, batch_size: int) -> Batch:
        part = _parts(config, num_partitions)[index]
        rng = rng_for(config.seed, "batch", server_round, profile.name)
        drawn = rng.choice(part, size=min(batch_size, len(part)), replace=False)
        return make_batch(train, drawn, tokenizer, max_length=config.max_length)

    flops = model_costs(config, model).flops
    true_flops_per_s = profile.flops_per_s * lognormal(
        config.profile_error, rng_for(config.seed, "profile error", profile.name)
    )

    def simulated_compute_s(assignment: Assignment) -> float:
        jitter = lognormal(
            config.compute_jitter,
            rng_for(config.seed, "jitter", assignment.server_round, profile.name),
        )
        return float(flops[assignment.block_index] / true_flops_per_s * jitter)

    client: Client = BlockClient(
        model=model,
        partition=model_blocks(config, model),
        profile=profile,
        batch_source=draw_batch,
        seed=config.seed,
        simulated_compute_s=simulated_compute_s,
    ).to_client()
    return client


app = ClientApp(client_fn)
