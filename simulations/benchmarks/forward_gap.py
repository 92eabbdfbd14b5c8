"""How near forward mode and comparing losses come to back-propagation: two tables.

``python -m simulations.benchmarks.forward_gap``. The attack bench's small model trains
one block and the head by plain steps, three ways from the same start: by the gradient,
by losses compared along directions, and by derivatives along them, with as many
directions as take the same forward passes, and with the same number. What a derivative
takes is counted on MiniLM, whose layers weigh more beside attention and head than the
small model's, in favour of forward mode. The second table shows why: how far a step's
estimates are off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn

from lola_flwr.arrays import Float32Array
from lola_flwr.costs.of_model import zeroth_order_costs
from lola_flwr.model.backprop import Batch, block_gradient
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.stored_base import evaluation_mode
from lola_flwr.randomness import rng_for
from lola_flwr.zeroth_order.directions import Directions, estimated_gradient
from lola_flwr.zeroth_order.forward_costs import forward_mode_costs
from lola_flwr.zeroth_order.forward_mode import AT_A_TIME, directional_derivatives
from lola_flwr.zeroth_order.projections import projected_gradients
from simulations.attacks.small import SmallTask, small_model
from simulations.compare.tasks import Task, text_task

# MiniLM's first, middle and last block stand for the small model's.
COUNTED_BLOCKS = (0, 3, 5)
STEPS, BATCH, DIRECTIONS, SEEDS = 80, 16, 4, (0, 1, 2)
LEARNING_RATES = (0.05, 0.1, 0.2, 0.4)
# Examples that the training loss at the end is the mean over, and estimates of a
# gradient that errors are.
JUDGED, ESTIMATES = 2048, 8

Project = Callable[..., tuple[Float32Array, float]]
Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Way:
    """How a step comes by its gradient.

    Parameters
    ----------
    name
        Name for the tables.
    project
        Gives the gradient's projections; None: the gradient itself, by
        back-propagation.
    count
        Directions of a step.
    """

    name: str
    project: Project | None = None
    count: int = 0

    def gradient(
        self,
        model: nn.Module,
        partition: BlockPartition,
        block: int,
        batch: Batch,
        *,
        seed: int,
    ) -> Gradients:
        """Return the gradient of a block and the head, or its estimate, by name."""
        if self.project is None:
            return block_gradient(model, partition, block, batch).gradients
        names = partition.update_names(block)
        values = {n: model.get_parameter(n).numpy(force=True) for n in names}
        directions = Directions(seed, self.count)
        projections, _ = self.project(model, names, batch, directions=directions)
        found = estimated_gradient(
            values, names, directions=directions, projections=projections
        )
        return {name: torch.from_numpy(array) for name, array in found.items()}


@dataclass(frozen=True)
class Errors:
    """How far a way's estimates of one gradient are off.

    Parameters
    ----------
    cosine
        Mean cosine to the gradient.
    variance
        Mean square of what an estimate differs by, in squares of the gradient's norm.
    """

    cosine: float
    variance: float


def passes_per_direction(
    model: nn.Module,
    partition: BlockPartition,
    blocks: Sequence[int],
    *,
    batch_size: int,
    sequence_length: int,
) -> list[float]:
    """Count the forward passes that a derivative along a direction takes, by block."""
    sizes = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "num_directions": AT_A_TIME,
    }
    derivatives = forward_mode_costs(model, partition, **sizes).flops
    compared = zeroth_order_costs(model, partition, **sizes).flops
    return [2 * float(derivatives[block] / compared[block]) for block in blocks]


def directions_for(forward_passes: float, per_direction: float) -> int:
    """Return how many directions come nearest to some forward passes."""
    passes = round(forward_passes / per_direction / AT_A_TIME)
    return AT_A_TIME * max(1, passes)


def final_loss(way: Way, block: int, lr: float, seed: int, steps: int = STEPS) -> float:
    """Train a block and the head, and return the training loss at the end.

    Without dropout whatever the way: where losses are compared there can be none. Ways
    of one seed have the same start, batches and directions. A loss that is no number is
    infinite.
    """
    model, partition = small_model(seed)
    evaluation_mode(model)
    task = SmallTask.split(1, alpha=None, seed=seed)
    for step in range(steps):
        number = int(rng_for(seed, "directions", step).integers(2**62))
        batch = task.draw(0, step, BATCH)
        gradient = way.gradient(model, partition, block, batch, seed=number)
        with torch.no_grad():
            for name, values in gradient.items():
                model.get_parameter(name).sub_(values, alpha=lr)
    with torch.no_grad():
        loss = model(**task.draw(0, steps, JUDGED)).loss.item()
    return loss if math.isfinite(loss) else math.inf


def best_losses(
    way: Way, block: int, rates: Sequence[float] = LEARNING_RATES
) -> tuple[float, list[float]]:
    """Choose the rate by the first seed; return it and all seeds' losses."""
    first, rest = SEEDS[0], SEEDS[1:]
    losses = {lr: final_loss(way, block, lr, first) for lr in rates}
    lr = min(losses, key=losses.__getitem__)
    return lr, [losses[lr], *(final_loss(way, block, lr, seed) for seed in rest)]


def errors_of(
    way: Way, model: nn.Module, partition: BlockPartition, block: int, batch: Batch
) -> Errors:
    """Compare a way's estimates of a gradient with it."""
    evaluation_mode(model)
    exact = _flat(block_gradient(model, partition, block, batch).gradients)
    cosines, variances = [], []
    for number in range(ESTIMATES):
        gradient = way.gradient(model, partition, block, batch, seed=number)
        found = _flat(gradient)
        cosines.append(torch.cosine_similarity(found, exact, 0).item())
        variances.append(((found - exact).norm() / exact.norm()).item() ** 2)
    return Errors(mean(cosines), mean(variances))


def _flat(gradients: Gradients) -> Tensor:
    return torch.cat([g.detach().flatten() for g in gradients.values()]).double()


def print_gaps(per_direction: Sequence[float]) -> None:
    """Train all ways, and print losses, and gaps to back-propagation."""
    budget = 2.0 * DIRECTIONS
    print("| block | way | directions | forward passes | rate | loss | gap | of it |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for block, passes in enumerate(per_direction):
        count = directions_for(budget, passes)
        compared = Way("losses compared", projected_gradients, DIRECTIONS)
        same = Way("forward mode, as many", directional_derivatives, DIRECTIONS)
        derived = Way("forward mode", directional_derivatives, count)
        rows = [(Way("back-propagation"), ""), (compared, f"{budget:.1f}")]
        if count != DIRECTIONS:
            rows.append((derived, f"{count * passes:.1f}"))
        rows.append((same, f"{DIRECTIONS * passes:.1f}"))
        found: dict[str, tuple[float, list[float]]] = {}
        for way, spent in rows:
            # With the same directions it is the same run, to rounding.
            rates = (found[compared.name][0],) if way is same else LEARNING_RATES
            lr, losses = found[way.name] = best_losses(way, block, rates)
            gap = mean(losses) - mean(found["back-propagation"][1])
            cells = [way.name, str(way.count or ""), spent, f"{lr:g}"]
            cells.append(f"{mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})")
            cells.append(f"{gap:.4f}" if way.count else "")
            of_it = ""
            if way.project is directional_derivatives:
                wider = mean(found[compared.name][1])
                of_it = f"{gap / (wider - mean(found['back-propagation'][1])):.2f}"
            print(f"| {block} | {' | '.join(cells)} | {of_it} |", flush=True)


def print_errors(
    name: str,
    task: Task | SmallTask,
    model: nn.Module,
    partition: BlockPartition,
    blocks: Mapping[int, int],
) -> None:
    """Print how far estimates are off at a model's start, for blocks and directions."""
    batch = task.draw(0, 0, BATCH)
    for block, count in blocks.items():
        names = partition.update_names(block)
        weights = sum(model.get_parameter(name).numel() for name in names)
        ways = [
            Way("losses compared", projected_gradients, DIRECTIONS),
            Way("forward mode", directional_derivatives, DIRECTIONS),
        ]
        if count != DIRECTIONS:
            ways.append(Way("forward mode", directional_derivatives, count))
        for way in ways:
            errors = errors_of(way, model, partition, block, batch)
            expected = math.sqrt(way.count / (weights + way.count - 1))
            print(
                f"| {name}, {block} | {way.name} | {way.count} | {errors.cosine:.4f} | "
                f"{expected:.4f} | {errors.variance:.5g} | "
                f"{(weights - 1) / way.count:.5g} |",
                flush=True,
            )


def main() -> None:
    """Print what derivatives take, and both tables."""
    torch.set_num_threads(1)
    small, partition = small_model(0)
    split = SmallTask.split(1, alpha=None, seed=0)
    task = text_task("acceptability", data_dir=None, num_devices=1, seed=0)
    per_direction = passes_per_direction(
        task.model, task.partition, COUNTED_BLOCKS, batch_size=16, sequence_length=32
    )
    own = passes_per_direction(
        small, partition, range(3), batch_size=BATCH, sequence_length=split.max_tokens
    )
    for name, passes in (("MiniLM", per_direction), ("small", own)):
        listed = ", ".join(f"{one:.2f}" for one in passes)
        print(f"{name}: a derivative takes {listed} forward passes")
    counts = [directions_for(2.0 * DIRECTIONS, passes) for passes in per_direction]
    print()
    print(
        "| model, block | way | directions | cosine | expected | variance | expected |"
    )
    print("|---|---|---:|---:|---:|---:|---:|")
    print_errors("small", split, small, partition, dict(enumerate(counts)))
    blocks = dict(zip(COUNTED_BLOCKS, counts, strict=True))
    print_errors("MiniLM", task, task.model, task.partition, blocks)
    print()
    print_gaps(per_direction)


if __name__ == "__main__":
    main()
