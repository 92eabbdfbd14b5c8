"""How far the gradient of chosen examples is from that of the pool they stand for.

Run with ``pytest simulations/benchmarks/bench_samplers.py -s``. The model is the small
ViT of ``make compare`` on its textures, at its start and after rounds of training; the
mini-batch has 16 of a pool's 32 or 64 examples, the gradient is the whole model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lola_flwr.device.sampler_options import Coreset, Entropy, Rule
from lola_flwr.device.sampling import ChosenBatches
from lola_flwr.model.backprop import Batch, block_gradient
from lola_flwr.model.stored_base import evaluation_mode
from simulations.compare.methods import Method, RunSettings
from simulations.compare.runs import run_method
from simulations.compare.tasks import Task, image_task

BATCH_SIZE, POOLS = 16, 12


def gradient(task: Task, batch: Batch) -> Tensor:
    """Return the gradient of all that is trained, as a vector."""
    evaluation_mode(task.model)
    partition = task.partition.merged()
    found = block_gradient(task.model, partition, 0, batch).gradients
    return torch.cat([value.flatten() for value in found.values()])


def mean_of(gradients: Sequence[Tensor]) -> Tensor:
    """Return the mean of some gradients."""
    return torch.stack(list(gradients)).mean(0)


def at_random(pool: Batch, rows: np.random.Generator) -> Batch:
    """Draw a mini-batch of a pool."""
    drawn = rows.choice(len(pool["labels"]), BATCH_SIZE, replace=False)
    return {name: tensor[drawn] for name, tensor in pool.items()}


def differences(
    whole: Sequence[Tensor], chosen: Sequence[Tensor]
) -> tuple[float, float, float]:
    """Return cosine and relative error to pools' gradients, and the bias of the mean.

    The bias is what is left of the error in the mean over the pools.
    """
    pairs = list(zip(chosen, whole, strict=True))
    cosines = [float(torch.cosine_similarity(c, w, dim=0)) for c, w in pairs]
    errors = [float((c - w).norm() / w.norm()) for c, w in pairs]
    bias = (mean_of(chosen) - mean_of(whole)).norm() / mean_of(whole).norm()
    return float(np.mean(cosines)), float(np.mean(errors)), float(bias)


def chooser(task: Task, rule: Rule) -> Callable[[Batch], Batch]:
    """Return what picks a mini-batch out of a pool by a rule."""

    def choose(pool: Batch) -> Batch:
        source = ChosenBatches(
            source=lambda *_: pool, load_model=lambda: task.model, rule=rule
        )
        return source(1, BATCH_SIZE)

    return choose


def test_gradients_of_chosen_examples_beside_their_pools(capfd):
    table = []
    for rounds in (0, 20):
        task = image_task(num_devices=6, seed=0)
        if rounds:
            settings = RunSettings(
                num_devices=6, batch_size=BATCH_SIZE, rounds=rounds, eval_every=rounds
            )
            run_method(task, Method(), settings, lambda _: None)
        for factor in (2, 4):
            generator = np.random.default_rng(0)
            choices = {
                "random": lambda pool, rows=generator: at_random(pool, rows),
                "entropy": chooser(task, Entropy(pool_factor=factor)),
                "coreset": chooser(task, Coreset(pool_factor=factor)),
                "coreset, weighted": chooser(
                    task, Coreset(pool_factor=factor, weighted=True)
                ),
            }
            size = factor * BATCH_SIZE
            pools = [task.draw(n % 6, 1000 + n, size) for n in range(POOLS)]
            whole = [gradient(task, pool) for pool in pools]
            found = {
                name: differences(whole, [gradient(task, choose(p)) for p in pools])
                for name, choose in choices.items()
            }
            table += [(rounds, factor, name, *row) for name, row in found.items()]
    with capfd.disabled():
        print("\nrounds pool  rule               cosine  rel. error  bias of the mean")
        for rounds, factor, name, cosine, error, bias in table:
            print(
                f"{rounds:6d} {factor:3d}x  {name:18s} {cosine:6.3f} {error:10.3f} "
                f"{bias:12.3f}"
            )
