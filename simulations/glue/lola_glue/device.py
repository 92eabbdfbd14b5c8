"""A simulated device with its part of the training data; it needs no Flower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import PreTrainedTokenizerBase

from lola_flwr.app.device import DeviceParts, KnownCosts, make_device
from lola_flwr.arrays import IntArray
from lola_flwr.clients import BlockDevice
from lola_flwr.clients.node import node_partition
from lola_flwr.deployment.app_code import DeviceContext
from lola_flwr.device.loss_history import HistoryBatches
from lola_flwr.device.sampler_options import History
from lola_flwr.device.sampling import ChosenBatches
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition
from lola_glue.config import GlueConfig, SampledConfig
from lola_glue.costs import load_model, model_blocks, model_costs
from lola_glue.partitions import partition_examples
from lola_glue.tasks import Examples, Task, load_task
from lola_glue.text import make_batch

# A worker process serves many virtual devices: it holds one model and one copy of the
# data for all of them.


@dataclass(frozen=True, eq=False)
class _WorkerModel:
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    partition: BlockPartition


@lru_cache(maxsize=1)
def _worker_model(config: GlueConfig) -> _WorkerModel:
    task, _ = _training_data(config)
    model, tokenizer = load_model(config, task)
    return _WorkerModel(model, tokenizer, model_blocks(config, model))


@lru_cache(maxsize=1)
def _worker_costs(config: SampledConfig) -> KnownCosts:
    worker = _worker_model(config)
    costs = model_costs(config, worker.model)
    return KnownCosts.of(config, worker.model, worker.partition, costs)


@lru_cache(maxsize=1)
def _training_data(config: GlueConfig) -> tuple[Task, Examples]:
    task, train, _ = load_task(config.task, config.data_dir, seed=config.seed)
    return task, train


def prepare(run_config: Mapping[str, object]) -> None:
    """Load what the devices of a process share."""
    config = GlueConfig.from_run_config(run_config)
    _worker_model(config)
    if isinstance(config, SampledConfig):
        _worker_costs(config).count(config)


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


def device_fn(context: DeviceContext) -> BlockDevice:
    """Make one device."""
    config = GlueConfig.from_run_config(context.run_config)

    def load_model() -> tuple[nn.Module, BlockPartition]:
        loaded = _worker_model(config)
        return loaded.model, loaded.partition

    def examples(index: int, num_partitions: int, rows: IntArray) -> Batch:
        train = _training_data(config)[1]
        drawn = _parts(config, num_partitions)[index][rows]
        tokenizer = _worker_model(config).tokenizer
        return make_batch(train, drawn, tokenizer, max_length=config.max_length)

    def draw(
        index: int, num_partitions: int, rng: np.random.Generator, batch_size: int
    ) -> Batch:
        count = num_examples(index, num_partitions)
        rows = rng.choice(count, size=min(batch_size, count), replace=False)
        return examples(index, num_partitions, rows)

    def costs() -> KnownCosts:
        # Where devices train nothing by themselves, it is not asked.
        assert isinstance(config, SampledConfig)
        return _worker_costs(config)

    def num_examples(index: int, num_partitions: int) -> int:
        return len(_parts(config, num_partitions)[index])

    parts = DeviceParts(
        load_model=load_model, draw=draw, costs=costs, num_examples=num_examples
    )
    device = make_device(context, config, parts)
    rule = config.chosen_by if isinstance(config, SampledConfig) else None
    if rule is None:
        return device
    if isinstance(rule, History):
        part = node_partition(context)
        assert device.store is not None  # `make_device` gives it one
        return HistoryBatches(
            num_examples=num_examples(*part),
            examples=partial(examples, *part),
            store=device.store,
            device=device.profile.name,
            rule=rule,
            seed=config.seed,
        ).on(device)
    chosen = ChosenBatches(
        source=device.batch_source,
        load_model=lambda: _worker_model(config).model,
        rule=rule,
    )
    # The pool that it chooses from is computed with its padding.
    return replace(device, batch_source=chosen, sequence_length=None)
