"""What fine-tuning each depth costs a device: measured here, and by the cost model.

After Fig. 4 of Wu, Chen, Huang, arXiv:2407.09873: RoBERTa-base, batches of 16
sentences of 64 tokens, the length that CoLA's sentences are padded to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.allocation import allocate
from lola_flwr.arrays import Float64Array
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

T = TypeVar("T")

WHOLE_MODEL = "whole model"
_FLOAT_BYTES = 4


# --- Fig. 4(a) -----------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """CPU seconds of one depth's steps, forward and backward; shape [steps, 2]."""

    steps_s: Float64Array

    @property
    def mean_s(self) -> Float64Array:
        """Mean of the forward and of the backward pass, shape [2]."""
        return np.asarray(self.steps_s.mean(axis=0))

    @property
    def deviation_s(self) -> float:
        """Standard deviation of a step; 0 of one alone."""
        return float(self.steps_s.sum(axis=1).std(ddof=min(1, len(self.steps_s) - 1)))

    @property
    def spread(self) -> float:
        """Standard error of the mean step, relative to it; infinite of one alone."""
        if len(self.steps_s) == 1:
            return math.inf
        error_s = self.deviation_s / math.sqrt(len(self.steps_s))
        return float(error_s / self.mean_s.sum())


def repeated(
    steps: Mapping[T, Callable[[], tuple[float, float]]],
    *,
    spread: float,
    least: int,
    most: int,
    report: Callable[[str], object],
) -> dict[T, Timed]:
    """Time each of several steps until the spread of its mean is small.

    Parameters
    ----------
    steps
        By name, what takes a step and returns the seconds of its two parts.
    spread
        Standard error of the mean, relative to it, that is small enough.
    least, most
        Steps of each, whatever their spread.
    report
        Called with a line for each that is done.
    """
    timed: dict[T, list[tuple[float, float]]] = {name: [] for name in steps}
    done: dict[T, Timed] = {}
    # All in turn, so that a busy spell of the machine hits them alike.
    while len(done) < len(steps):
        for name in [name for name in steps if name not in done]:
            timed[name].append(steps[name]())
            found = Timed(np.array(timed[name]))
            count = len(timed[name])
            if count >= least and (found.spread <= spread or count >= most):
                done[name] = found
                report(
                    f"  depth {name}: {found.mean_s.sum():.3f} s ± {found.spread:.1%}, "
                    f"{count} steps ({len(done)} of {len(steps)})"
                )
    return done


def depth_rows(
    *,
    model_name: str = MODEL,
    batch_size: int = 16,
    sequence_length: int = 64,
    spread: float = 0.01,
    least: int = 3,
    most: int = 20,
    report: Callable[[str], object] = print,
) -> list[Row]:
    """Measure one training step of every depth, and of the whole model.

    Parameters
    ----------
    model_name
        A model of `lola_flwr.model.loading.load_classifier`.
    batch_size, sequence_length
        Shape of the mini-batch, without padding.
    spread, least, most, report
        As for `repeated`.

    Returns
    -------
    One row for each depth, 1 being the last layer: CPU seconds of the forward and the
    backward pass on one thread, means, with the standard deviation of a step and the
    number of steps; bytes that autograd keeps between them without and with dropout;
    and the cost model's figures for the same. The cost model counts operations; its
    seconds are those at the speed at which its sum over all depths equals what was
    measured.
    """
    model, _ = load_classifier(model_name, num_labels=2)
    shapes = {name: tuple(values.shape) for name, values in model.named_parameters()}
    layers = partition_parameters(shapes)
    merged = layers.merged()
    steps: dict[int | str, tuple[BlockPartition, int]] = {
        depth: (layers, layers.num_blocks - depth)
        for depth in range(1, layers.num_blocks + 1)
    }
    steps[WHOLE_MODEL] = merged, 0
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
    with _one_thread():
        _timed_step(model, merged, 0, batch)  # the first step also fills caches
        timed = repeated(
            {
                depth: partial(_timed_step, model, *step, batch)
                for depth, step in steps.items()
            },
            spread=spread,
            least=least,
            most=most,
            report=report,
        )
    flops, model_bytes = _modelled(
        model.config.hidden_size, shapes, layers, batch_size, sequence_length
    )
    measured_s = sum(float(found.mean_s.sum()) for found in timed.values())
    flops_per_s = sum(flops) / measured_s
    rows: list[Row] = []
    for row, (depth, (partition, block_index)) in enumerate(steps.items()):
        forward_s, backward_s = timed[depth].mean_s.tolist()
        plain, dropout = (
            _kept_bytes(model, partition, block_index, batch, training=training)
            for training in (False, True)
        )
        rows.append(
            {
                "depth": depth,
                "forward_s": forward_s,
                "backward_s": backward_s,
                "deviation_s": timed[depth].deviation_s,
                "steps": len(timed[depth].steps_s),
                "model_s": flops[row] / flops_per_s,
                "model_flops": flops[row],
                "saved_bytes": plain,
                "saved_with_dropout_bytes": dropout,
                "model_saved_bytes": model_bytes[row],
            }
        )
    return rows


def _modelled(
    hidden_size: int,
    shapes: Mapping[str, Sequence[int]],
    layers: BlockPartition,
    batch_size: int,
    sequence_length: int,
) -> tuple[list[float], list[float]]:
    """Return operations and kept bytes of each depth, the whole model last."""
    flops: list[float] = []
    kept_bytes: list[float] = []
    for merged in (False, True):
        costs = estimate_costs(
            shapes,
            layers,
            batch_size=batch_size,
            sequence_length=sequence_length,
            merged=merged,
        )
        assert costs.step is not None
        # Besides, one hidden state is on its way back.
        passing = _FLOAT_BYTES * sequence_length * hidden_size
        kept = batch_size * (np.asarray(costs.step.pass_bytes.per_sequence) - passing)
        flops += costs.flops[::-1].tolist()
        kept_bytes += kept[::-1].tolist()
    return flops, kept_bytes


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
    """CPU seconds of one forward and of one backward pass."""
    with only_block_trainable(model, partition, block_index) as trainable:
        # What else runs on the machine takes none of this process's time.
        start = time.process_time()
        loss = model_loss(model, batch)
        middle = time.process_time()
        torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        return middle - start, time.process_time() - middle


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have torch compute on one thread: threads that wait take CPU time, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
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
