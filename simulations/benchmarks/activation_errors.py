"""What keeping activations in 8 bits saves, and the error and bias it brings: tables.

``python -m simulations.benchmarks.activation_errors``, on MiniLM. A step's peak is what
PyTorch's allocator has given out, weights apart, beside what the library counts. Bias
shows in the error of the mean gradient over mini-batches (sentences of the embedded
task): errors without a common part would leave what stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lola_flwr.costs.of_model import model_costs
from lola_flwr.model.activations import Activations, Rounding, quantised_suffix
from lola_flwr.model.backprop import (
    Batch,
    block_gradient,
    train_mode,
)
from simulations.benchmarks.counted_costs import allocated_at_peak
from simulations.compare.tasks import Task, text_task

BATCH, TOKENS, BATCHES, BLOCK = 8, 64, 12, 2


@dataclass(frozen=True)
class Step:
    """A step that trains one block, with its layers' activations in some form."""

    task: Task
    block: int
    rounding: Rounding | None = None

    def context(self) -> AbstractContextManager[None]:
        """Return what the step runs in."""
        model, partition = self.task.model, self.task.partition
        if self.rounding is None:
            return nullcontext()
        return quantised_suffix(model, partition, self.block, rounding=self.rounding)

    def gradient(self, batch: Batch) -> Tensor:
        """Return the block's gradient, with the same dropout every time."""
        model, partition = self.task.model, self.task.partition
        torch.manual_seed(1)
        with self.context():
            found = block_gradient(model, partition, self.block, batch).gradients
        return torch.cat(
            [found[name].flatten() for name in partition.blocks[self.block]]
        )


def stochastic(values: Tensor) -> Tensor:
    """Round up as often as a number is near to the next."""
    return values.add_(torch.rand_like(values)).floor_().clamp_(max=255)


def print_saved(task: Task, batch: Batch) -> None:
    """Print what each block's step takes, and how far its gradient is off."""
    num_examples, num_tokens = batch["input_ids"].shape
    ways: tuple[Activations, Activations] = ("exact", "int8")
    counted = [
        model_costs(
            task.model,
            task.partition,
            batch_size=num_examples,
            sequence_length=num_tokens,
            activations=way,
        ).step
        for way in ways
    ]
    print("| block | peak, MB | counted | in 8 bits, MB | counted | error | cosine |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for block in range(task.partition.num_blocks):
        steps = [Step(task, block, rounding) for rounding in (None, torch.round_)]
        peaks = [allocated_at_peak(partial(step.gradient, batch)) for step in steps]
        exact, int8 = (step.gradient(batch).double() for step in steps)
        cells = [
            f"{num_bytes / 1e6:.1f}"
            for peak, step in zip(peaks, counted, strict=True)
            if step is not None
            for num_bytes in (peak, step.whole_bytes[block])
        ]
        cells += [
            f"{(int8 - exact).norm() / exact.norm():.4f}",
            f"{torch.cosine_similarity(int8, exact, 0):.5f}",
        ]
        print(f"| {block} | {' | '.join(cells)} |", flush=True)


def print_bias(batches: list[Batch], step: Callable[[Rounding | None], Step]) -> None:
    """Print what is left of the errors in the mean over mini-batches."""
    print("| rounding | error of a gradient | of the mean | without a common part |")
    print("|---|---:|---:|---:|")
    exacts = torch.stack([step(None).gradient(batch) for batch in batches])
    roundings = {"to the nearest": torch.round_, "stochastic": stochastic}
    for name, rounding in roundings.items():
        found = torch.stack([step(rounding).gradient(batch) for batch in batches])
        errors = (found - exacts).norm(dim=1)
        mean = exacts.mean(0).norm()
        cells = (
            f"{(errors / exacts.norm(dim=1)).mean():.4f}",
            f"{(found - exacts).mean(0).norm() / mean:.4f}",
            f"{errors.square().mean().sqrt() / math.sqrt(len(batches)) / mean:.4f}",
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print both tables."""
    torch.manual_seed(0)
    task = text_task("acceptability", data_dir=None, num_devices=1, seed=0)
    train_mode(task.model)
    batches = [task.draw(0, number, BATCH) for number in range(BATCHES)]
    full = {
        "input_ids": torch.randint(1000, 2000, (2 * BATCH, TOKENS)),
        "labels": torch.arange(2 * BATCH) % 2,
    }
    print_saved(task, full)
    print()
    print_bias(batches, lambda rounding: Step(task, BLOCK, rounding))


if __name__ == "__main__":
    main()
