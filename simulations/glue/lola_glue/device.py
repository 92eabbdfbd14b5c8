"""A simulated device with its part of the training data; it needs no Flower."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import PreTrainedTokenizerBase

from lola_flwr.clients import BlockDevice
from lola_flwr.clients.node import node_partition, node_profile, states_profile
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.d2ft.operations import from_text
from lola_flwr.d2ft.reduced import reduced_costs
from lola_flwr.deployment.app_code import DeviceContext
from lola_flwr.device.sampling import ChosenBatches
from lola_flwr.device.store import run_store
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.randomness import rng_for
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.records import Assignment
from lola_flwr.zeroth_order.mixing import ZerothOrder
from lola_glue.config import GlueConfig, LolaDeftConfig, UpdatesConfig
from lola_glue.costs import load_model, model_blocks, model_costs
from lola_glue.methods import zeroth_order_of
from lola_glue.partitions import partition_examples
from lola_glue.profiles import configured, simulated_profile
from lola_glue.tasks import Examples, Task, load_task
from lola_glue.text import make_batch

# A worker process serves many virtual devices: it holds one model and one copy of the
# data for all of them.


@dataclass(frozen=True, eq=False)
class _WorkerModel:
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    partition: BlockPartition


@dataclass(frozen=True, eq=False)
class _WorkerCosts:
    of_blocks: BlockCosts
    zeroth_order: ZerothOrder | None


@lru_cache(maxsize=1)
def _worker_model(config: GlueConfig) -> _WorkerModel:
    task, _ = _training_data(config)
    model, tokenizer = load_model(config, task)
    return _WorkerModel(model, tokenizer, model_blocks(config, model))


@lru_cache(maxsize=1)
def _worker_costs(config: UpdatesConfig) -> _WorkerCosts:
    worker = _worker_model(config)
    zeroth_order = None
    if isinstance(config, LolaDeftConfig):
        zeroth_order = zeroth_order_of(config, worker.model, worker.partition)
    return _WorkerCosts(model_costs(config, worker.model), zeroth_order)


@lru_cache(maxsize=1)
def _training_data(config: GlueConfig) -> tuple[Task, Examples]:
    task, train, _ = load_task(config.task, config.data_dir, seed=config.seed)
    return task, train


def split(
    config: GlueConfig, train: Examples, num_partitions: int
) -> list[npt.NDArray[np.intp]]:
    """Return which examples each device has, or raise a `PartitionError`."""
    return partition_examples(
        train.labels,
        num_partitions,
        partitioning=config.partitioning,
        alpha=config.dirichlet_alpha,
        seed=config.seed,
    )


@lru_cache(maxsize=1)
def _parts(config: GlueConfig, num_partitions: int) -> list[npt.NDArray[np.intp]]:
    return split(config, _training_data(config)[1], num_partitions)


def lognormal(sigma: float, rng: np.random.Generator) -> float:
    """Draw a factor around 1 whose logarithm has the standard deviation sigma."""
    return float(np.exp(sigma * rng.standard_normal()))


def device_fn(context: DeviceContext) -> BlockDevice:
    """Make one device: a simulated one, unless the node states a profile of its own."""
    config = GlueConfig.from_run_config(context.run_config)
    index, num_partitions = node_partition(context)
    measured = states_profile(context.node_config)
    profile = node_profile(context) if measured else simulated_profile(config, index)
    profile = configured(profile, config, index)

    def load_model() -> tuple[nn.Module, BlockPartition]:
        loaded = _worker_model(config)
        return loaded.model, loaded.partition

    def draw_batch(server_round: int, batch_size: int) -> Batch:
        train = _training_data(config)[1]
        part = _parts(config, num_partitions)[index]
        rng = rng_for(config.seed, "batch", server_round, profile.name)
        drawn = rng.choice(part, size=min(batch_size, len(part)), replace=False)
        tokenizer = _worker_model(config).tokenizer
        return make_batch(train, drawn, tokenizer, max_length=config.max_length)

    device = BlockDevice(
        profile=profile,
        load_model=load_model,
        batch_source=draw_batch,
        store=run_store(context.run_id),
        accelerator=config.accelerator,
        precision=config.precision,
        seed=config.seed,
    )
    if isinstance(config, UpdatesConfig):
        return _training_blocks(device, config, simulated=not measured)
    return device


def _training_blocks(
    device: BlockDevice, config: UpdatesConfig, *, simulated: bool
) -> BlockDevice:
    """Return a device as it trains a block by itself, in simulated time or its own."""
    profile, batch_source = device.profile, device.batch_source
    if config.sampler != "random":
        batch_source = ChosenBatches(
            source=device.batch_source,
            load_model=lambda: _worker_model(config).model,
            rule=config.sampler,
        )
    return replace(
        device,
        batch_source=batch_source,
        micro_batch_size=config.micro_batch_size,
        costs=lambda: _worker_costs(config).of_blocks,
        simulated_compute_s=(
            partial(_simulated_compute_s, config, profile) if simulated else None
        ),
    )


def _simulated_compute_s(
    config: UpdatesConfig, profile: DeviceProfile, assignment: Assignment
) -> float:
    error = rng_for(config.seed, "profile error", profile.name)
    jitter = rng_for(config.seed, "jitter", assignment.server_round, profile.name)
    known = _worker_costs(config)
    costs = known.of_blocks
    if assignment.direction_seed is not None and known.zeroth_order is not None:
        costs = known.zeroth_order.costs
    flops = float(costs.flops[assignment.block_index])
    if assignment.operations is not None:
        operations = from_text(assignment.operations)
        flops, _ = reduced_costs(costs, assignment.block_index, operations)
    return float(
        flops
        / profile.flops_per_s
        * lognormal(config.profile_error, error)
        * lognormal(config.compute_jitter, jitter)
    )
