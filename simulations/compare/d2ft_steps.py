"""Train by D2FT's steps: one model, spread over the devices."""

from __future__ import annotations

import numpy as np
import torch

from lola_flwr.costs.of_model import model_costs
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import Budgets, Scores, place_subnetworks
from lola_flwr.d2ft.scores import score_subnetworks
from lola_flwr.d2ft.steps import (
    StepSchedules,
    activation_bytes,
    compute_s,
    uploads_s,
)
from lola_flwr.d2ft.subnetworks import hidden_size
from lola_flwr.d2ft.training import scheduled_gradient
from lola_flwr.model.backprop import Batch
from lola_flwr.model.loading import load_values
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.randomness import rng_for
from lola_flwr.system.channel import Channel
from lola_flwr.system.devices import simulated_device
from lola_flwr.system.own_channel import Moment
from simulations.compare.measure import counted_flops, peak_bytes
from simulations.compare.methods import Method, Point, Report, RunSettings
from simulations.compare.tasks import PATCH_SIZE, Task


def run_d2ft(task: Task, method: Method, settings: RunSettings, report: Report) -> None:
    """Train a model whose sub-networks are spread over the devices, in one process.

    A step's wireless time is that of its computation and of its uploads, by
    ``lola_flwr.d2ft.steps``. ``report`` is called with what is evaluated.
    """
    model, partition = task.model, task.partition
    subnetworks = find_subnetworks(model, partition, num_groups=method.num_groups)
    profiles = [
        simulated_device(i, seed=settings.seed) for i in range(settings.num_devices)
    ]
    device_of = place_subnetworks(subnetworks.count, np.ones(settings.num_devices))
    parameters = dict(model.named_parameters())
    optimizer = ServerOptimizer(
        {name: parameters[name].numpy(force=True) for name in partition.trainable},
        lr=task.lr,
        linear_decay_steps=settings.linear_decay_steps,
    )
    schedules = StepSchedules(
        micro_batches=method.micro_batches,
        budgets=Budgets(compute=method.compute, traffic=method.traffic),
        same_micro_batches=method.same_micro_batches,
        shared_budgets=method.shared_budgets,
        backward_weight=method.backward_weight,
        solver=method.solver,
        seed=settings.seed,
    )
    unit_flops = _forward_flops(task, settings) / subnetworks.num_groups
    scores: Scores | None = None
    flops = payload = memory = 0
    wireless_s = 0.0
    names = partition.trainable
    for step in range(1, settings.rounds + 1):
        values = optimizer.state()
        load_values(model, names, [values[name] for name in names])
        parts = _micro_batches(task, method, settings, step)
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(
                int(rng_for(settings.seed, "dropout", step).integers(2**62))
            )
            if method.shared_budgets and (step - 1) % method.refresh == 0:
                scores, count = counted_flops(
                    score_subnetworks, model, subnetworks, names, parts[:1]
                )
                flops += count
            operations = schedules.operations(step, device_of, scores)
            # What all sub-networks skip says nothing about them.
            runs = np.flatnonzero((operations != Operation.SKIP).any(axis=0))
            kept = [parts[index] for index in runs]
            work = model, subnetworks, names, kept, operations[:, runs]
            if step == 1:
                memory = peak_bytes(model, scheduled_gradient, *work)
            result, count = counted_flops(scheduled_gradient, *work)
        flops += count
        optimizer.step({n: g.numpy() for n, g in result.gradients.items()})
        sent_bytes = activation_bytes(
            operations,
            [_num_tokens(part) for part in parts],
            hidden_size(subnetworks),
        )
        wireless_s += compute_s(
            operations,
            device_of,
            [profile.flops_per_s for profile in profiles],
            num_layers=subnetworks.num_layers,
            forward_flops=[len(part["labels"]) * unit_flops for part in parts],
        ) + uploads_s(
            np.bincount(device_of, sent_bytes, minlength=len(profiles)),
            profiles,
            channel=Channel(bandwidth_hz=settings.bandwidth_hz),
            moment=Moment(step, wireless_s, settings.seed),
        )
        payload += int(sent_bytes.sum())
        if settings.is_evaluated(step):
            values = optimizer.state()
            load_values(model, names, [values[name] for name in names])
            metrics = task.evaluate()
            report(Point(step, metrics, wireless_s, flops, payload, memory))
            if settings.is_reached(metrics):
                return


def _forward_flops(task: Task, settings: RunSettings) -> float:
    """Return what a layer's forward pass over one example takes, by the cost model."""
    costs = model_costs(
        task.model,
        task.partition,
        batch_size=settings.batch_size,
        sequence_length=task.sequence_length,
    )
    return float(costs.flops[0] - costs.flops[1]) / settings.batch_size


def _micro_batches(
    task: Task, method: Method, settings: RunSettings, step: int
) -> list[Batch]:
    """Draw a step's micro-batches, each from the data of another device in turn."""
    examples = settings.num_devices * settings.batch_size
    first = (step - 1) * method.micro_batches
    return [
        task.draw(
            (first + number) % settings.num_devices,
            first + number + 1,
            max(1, round(examples / method.micro_batches)),
        )
        for number in range(method.micro_batches)
    ]


def _num_tokens(part: Batch) -> int:
    """Return the tokens of a micro-batch: of its texts, or of its images' patches."""
    if "input_ids" in part:
        return part["input_ids"].numel()
    images, _, height, width = part["pixel_values"].shape
    return images * (height // PATCH_SIZE * (width // PATCH_SIZE) + 1)
