"""A simulated device with its part of the training data; it needs no Flower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from torch import nn

from lola_causal.config import CausalConfig
from lola_causal.model import causal_costs, causal_loss, load_model
from lola_causal.records import load_records
from lola_causal.sequences import Tokens, encode, num_learned, packed, padded, rows_of
from lola_flwr.app.config import UpdatesConfig
from lola_flwr.app.device import DeviceParts, KnownCosts, make_device
from lola_flwr.app.model import model_blocks
from lola_flwr.arrays import IntArray
from lola_flwr.clients import BlockDevice
from lola_flwr.deployment.app_code import DeviceContext
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition

# A worker process serves many virtual devices: it holds one model and one copy of the
# data for all of them.


@dataclass(frozen=True, eq=False)
class _Worker:
    model: nn.Module
    tokenizer: Any
    partition: BlockPartition
    sequences: list[Tokens]


@lru_cache(maxsize=1)
def _worker(config: CausalConfig) -> _Worker:
    train, _ = load_records(config.data, config.eval_data, seed=config.seed)
    model, tokenizer = load_model(config)
    sequences = encode(
        train, tokenizer, max_length=config.max_length, model_name=config.model
    )
    return _Worker(model, tokenizer, model_blocks(config, model), sequences)


@lru_cache(maxsize=1)
def _worker_costs(config: CausalConfig) -> KnownCosts:
    assert isinstance(config, UpdatesConfig)
    worker = _worker(config)
    costs = causal_costs(config, worker.model)
    return KnownCosts.of(config, worker.model, worker.partition, costs)


def prepare(run_config: Mapping[str, object]) -> None:
    """Load what the devices of a process share."""
    config = CausalConfig.from_run_config(run_config)
    _worker(config)
    if isinstance(config, UpdatesConfig):
        _worker_costs(config).count(config)


def split(num_sequences: int, num_partitions: int, seed: int) -> list[IntArray]:
    """Return which sequences each device has: equal parts, at random.

    Raises
    ------
    UserError
        There are more devices than sequences.
    """
    if num_sequences < num_partitions:
        raise UserError(
            f"{num_sequences} lines are too few for {num_partitions} devices; give "
            "more lines, or fewer devices."
        )
    order = np.random.default_rng(seed).permutation(num_sequences)
    return np.array_split(order, num_partitions)


def draw_batch(
    config: CausalConfig,
    part: list[Tokens],
    pad_id: int,
    rng: np.random.Generator,
    batch_size: int,
) -> Batch:
    """Draw a mini-batch of a device's sequences: so many, or so many packed rows."""
    order = rng.permutation(len(part))
    if config.packing:
        drawn = (part[index] for index in order)
        return packed(rows_of(drawn, batch_size, config.max_length), pad_id)
    return padded([part[index] for index in order[:batch_size]], pad_id)


def device_fn(context: DeviceContext) -> BlockDevice:
    """Make one device."""
    config = CausalConfig.from_run_config(context.run_config)

    def load() -> tuple[nn.Module, BlockPartition]:
        worker = _worker(config)
        return worker.model, worker.partition

    def draw(
        index: int, num_partitions: int, rng: np.random.Generator, batch_size: int
    ) -> Batch:
        worker = _worker(config)
        parts = split(len(worker.sequences), num_partitions, config.seed)
        part = [worker.sequences[n] for n in parts[index]]
        pad_id = worker.tokenizer.pad_token_id
        return draw_batch(config, part, pad_id, rng, batch_size)

    def num_examples(index: int, num_partitions: int) -> int:
        return len(
            split(len(_worker(config).sequences), num_partitions, config.seed)[index]
        )

    parts = DeviceParts(
        load_model=load,
        draw=draw,
        costs=lambda: _worker_costs(config),
        batch_weight=num_learned,
        num_examples=num_examples,
    )
    return replace(make_device(context, config, parts), loss_function=causal_loss)
