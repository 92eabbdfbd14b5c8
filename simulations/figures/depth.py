"""What fine-tuning each depth costs a device: measured here, and by the cost model.

After Fig. 4 of Wu, Chen, Huang, arXiv:2407.09873: RoBERTa-base, batches of 16
sentences of 64 tokens, the length that CoLA's sentences are padded to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.allocation import allocate
from lola_flwr.costs.counter import saved_bytes
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.model.backprop import model_loss, only_block_trainable
from lola_flwr.model.blocks import BlockPartition, partition_parameters
from lola_flwr.model.loading import load_classifier
from simulations.figures.latency import (
    MODEL,
    Draw,
    Setting,
    block_costs,
    draw_fleet,
    parameter_shapes,
    stated_draw,
)
from simulations.figures.tables import Row

WHOLE_MODEL = "whole model"
_FLOAT_BYTES = 4


# --- Fig. 4(a) -----------------------------------------------------------------------


def depth_rows(
    *,
    model_name: str = MODEL,
    batch_size: int = 16,
    sequence_length: int = 64,
    repeats: int = 3,
    num_threads: int = 2,
) -> list[Row]:
    """Measure one training step of every depth, and of the whole model.

    Parameters
    ----------
    model_name
        A model of `lola_flwr.model.loading.load_classifier`.
    batch_size, sequence_length
        Shape of the mini-batch, without padding.
    repeats
        Steps that are timed for each depth. The fastest counts: what else runs on the
        machine only ever adds time.
    num_threads
        Threads that torch may use.

    Returns
    -------
    One row for each depth, 1 being the last layer: seconds of the forward and the
    backward pass, bytes that autograd keeps between them without and with dropout, and
    the cost model's figures for the same. The cost model counts operations; its seconds
    are those at the speed at which its sum over all depths equals what was measured.
    """
    model, _ = load_classifier(model_name, num_labels=2)
    shapes = {name: tuple(values.shape) for name, values in model.named_parameters()}
    layers = partition_parameters(shapes)
    merged = layers.merged()
    steps: list[tuple[int | str, BlockPartition, int]] = [
        (depth, layers, layers.num_blocks - depth)
        for depth in range(1, layers.num_blocks + 1)
    ]
    steps.append((WHOLE_MODEL, merged, 0))
    input_ids = torch.randint(
        5,
        model.get_input_embeddings().num_embeddings,
        (batch_size, sequence_length),
        generator=torch.Generator().manual_seed(0),
    )
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.zeros(batch_size, dtype=torch.long),
    }
    timed: dict[int | str, list[tuple[float, float]]] = {step[0]: [] for step in steps}
    with _torch_threads(num_threads):
        _timed_step(model, merged, 0, batch)  # the first step also fills caches
        # All depths in turn, so that a busy spell of the machine hits them alike.
        for _ in range(repeats):
            for depth, partition, block_index in steps:
                timed[depth].append(_timed_step(model, partition, block_index, batch))
    flops: list[float] = []
    model_bytes: list[float] = []
    for whole in (False, True):
        costs = estimate_costs(
            shapes,
            layers,
            batch_size=batch_size,
            sequence_length=sequence_length,
            merged=whole,
        )
        assert costs.step is not None
        # Besides, one hidden state is on its way back.
        passing = 4.0 * sequence_length * model.config.hidden_size
        kept = batch_size * (costs.step.pass_bytes.per_sequence - passing)
        flops += costs.flops[::-1].tolist()
        model_bytes += kept[::-1].tolist()
    measured = [
        tuple(min(part) for part in zip(*timed[step[0]], strict=True)) for step in steps
    ]
    flops_per_s = sum(flops) / sum(map(sum, measured))
    rows: list[Row] = []
    for row, (depth, partition, block_index) in enumerate(steps):
        forward_s, backward_s = measured[row]
        plain, dropout = (
            _kept_bytes(model, partition, block_index, batch, training=training)
            for training in (False, True)
        )
        rows.append(
            {
                "depth": depth,
                "forward_s": forward_s,
                "backward_s": backward_s,
                "model_s": flops[row] / flops_per_s,
                "model_flops": flops[row],
                "saved_bytes": plain,
                "saved_with_dropout_bytes": dropout,
                "model_saved_bytes": model_bytes[row],
            }
        )
    return rows


def _kept_bytes(
    model: nn.Module,
    partition: BlockPartition,
    block_index: int,
    batch: dict[str, Tensor],
    *,
    training: bool,
) -> int:
    model.train(training)
    with only_block_trainable(model, partition, block_index):
        kept = saved_bytes(model, lambda: model_loss(model, batch))
    model.eval()
    return kept


def _timed_step(
    model: nn.Module,
    partition: BlockPartition,
    block_index: int,
    batch: dict[str, Tensor],
) -> tuple[float, float]:
    """Seconds of one forward and of one backward pass."""
    with only_block_trainable(model, partition, block_index) as trainable:
        start = time.perf_counter()
        loss = model_loss(model, batch)
        middle = time.perf_counter()
        torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        return middle - start, time.perf_counter() - middle


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _weights_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    return _FLOAT_BYTES * sum(math.prod(shape) for shape in shapes.values())


# --- Fig. 4(b) -----------------------------------------------------------------------


def memory_rows(
    draws: Sequence[Draw], *, batch_sizes: Sequence[int] = (4, 8, 16, 32)
) -> list[Row]:
    """Compare a device's memory alone and in cooperation.

    Parameters
    ----------
    draws
        Fleets and rounds to average over.
    batch_sizes
        Mini-batches to compare, sequences.

    Returns
    -------
    One row for each batch size and way of fine-tuning: the memory of an active device
    (mean, and largest), its parts, and the fraction of devices of the fleets that offer
    as much as the largest. Alone, a device trains the whole model; in cooperation, the
    exact allocation gives each active device one block.
    """
    return [
        row
        for batch_size in batch_sizes
        for row in _memory_of_batch(Setting(batch_size=batch_size), draws)
    ]


def _memory_of_batch(setting: Setting, draws: Sequence[Draw]) -> list[Row]:
    rows: list[Row] = []
    fleets = {draw.fleet for draw in draws}
    weights_bytes = _weights_bytes(parameter_shapes(MODEL))
    offered = np.array(
        [d.memory_bytes for f in fleets for d in draw_fleet(f, setting.num_devices)]
    )
    for way, merged in (("alone", True), ("cooperating", False)):
        costs = block_costs(
            setting.sequence_length,
            setting.batch_size,
            merged=merged,
        )
        if merged:
            active = np.zeros(1, dtype=np.int64)
        else:
            blocks = [
                allocate(stated_draw(setting, draw, merged=False).problem)
                for draw in draws
            ]
            active = np.concatenate(
                [a.block_of_device[a.block_of_device >= 0] for a in blocks]
            )
        gradient_bytes = costs.gradient_bytes
        rows.append(
            {
                "batch_size": setting.batch_size,
                "fine_tuning": way,
                "weights_bytes": weights_bytes,
                "gradients_bytes": float(gradient_bytes[active].mean()),
                "activations_bytes": float(
                    (costs.memory_bytes - gradient_bytes)[active].mean() - weights_bytes
                ),
                "mean_bytes": float(costs.memory_bytes[active].mean()),
                "largest_bytes": float(costs.memory_bytes[active].max()),
                "able_fraction": float(
                    (offered >= costs.memory_bytes[active].max()).mean()
                ),
            }
        )
    return rows
