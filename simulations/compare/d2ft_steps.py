"""Train by D2FT's steps: one model, spread over the devices."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lola_flwr.d2ft import (
    FULL_TUNING,
    Budgets,
    Operation,
    find_subnetworks,
    operation_values,
    place_subnetworks,
    schedule_subnetworks,
    scheduled_gradient,
    score_subnetworks,
)
from lola_flwr.d2ft.scores import Scores
from lola_flwr.d2ft.subnetworks import Subnetworks, base_of
from lola_flwr.errors import UserError
from lola_flwr.model_setup import model_costs
from lola_flwr.models import load_values
from lola_flwr.randomness import rng_for
from lola_flwr.server_optimizer import ServerOptimizer
from lola_flwr.system.channel import full_band_rate_bps, rayleigh_snr
from lola_flwr.system.devices import DeviceProfile, simulated_device
from lola_flwr.truncated_backprop import Batch
from simulations.compare.measure import counted_flops, peak_bytes
from simulations.compare.methods import Method, Point, Report, RunSettings
from simulations.compare.tasks import PATCH_SIZE, Task


def run_d2ft(task: Task, method: Method, settings: RunSettings, report: Report) -> None:
    """Train a model whose sub-networks are spread over the devices, in one process.

    A step's wireless time is that of the layers one after the other, each as long as
    its slowest device, and of the activations and gradients that are sent, each over
    the sender's whole band. Every sub-network sends its own, as in the paper, where it
    is the only one of its device: neighbours on one device would send less. ``report``
    is called with what is evaluated.
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
    budgets = Budgets(compute=method.compute, traffic=method.traffic)
    costs = model_costs(
        model,
        partition,
        batch_size=settings.batch_size,
        sequence_length=task.sequence_length,
    )
    # Forward passes of one sub-network over one example, as the cost model has it.
    layer_flops = costs.flops[0] - costs.flops[1]  # the forward pass of one layer
    unit_flops = layer_flops / settings.batch_size / subnetworks.num_groups
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
            operations = schedule_subnetworks(
                *_values_and_budgets(scores, device_of, method, settings, step),
                budgets,
                solver=method.solver,
            )
            # What all sub-networks skip says nothing about them.
            runs = np.flatnonzero((operations != Operation.SKIP).any(axis=0))
            if not runs.size:
                raise UserError(
                    f"compute={method.compute}, traffic={method.traffic} let no "
                    "sub-network run; raise the budgets."
                )
            kept = [parts[index] for index in runs]
            work = model, subnetworks, names, kept, operations[:, runs]
            if step == 1:
                memory = peak_bytes(model, scheduled_gradient, *work)
            result, count = counted_flops(scheduled_gradient, *work)
        flops += count
        optimizer.step({n: g.numpy() for n, g in result.gradients.items()})
        step_s, step_bytes = _step_costs(
            operations,
            parts,
            subnetworks,
            device_of,
            profiles,
            unit_flops,
            settings,
            step,
        )
        wireless_s += step_s
        payload += step_bytes
        if settings.is_evaluated(step):
            values = optimizer.state()
            load_values(model, names, [values[name] for name in names])
            report(Point(step, task.evaluate(), wireless_s, flops, payload, memory))


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


def _values_and_budgets(
    scores: Scores | None,
    device_of: npt.NDArray[np.int64],
    method: Method,
    settings: RunSettings,
    step: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return what a step's operations are worth, and whose budget each draws on.

    Between micro-batches chance decides: their own scores would take a backward pass
    over each, which is what the schedule is to save. Where every sub-network has its
    own budget, as in the paper, where a device holds one, there is nothing else to
    decide between, and nothing is scored.
    """
    shape = (device_of.size, method.micro_batches)
    weight = method.backward_weight
    rows = 1 if method.same_micro_batches else shape[0]
    chance = rng_for(settings.seed, "ties", step).random((rows, shape[1]))
    chance = np.broadcast_to(chance, shape)
    if scores is None:
        alike = Scores(np.ones(shape), np.ones(device_of.size), chance)
        each = np.arange(device_of.size)
        return operation_values(alike, each, backward_weight=weight), each
    spread = Scores(np.broadcast_to(scores.fisher, shape), scores.magnitude, chance)
    values = operation_values(spread, device_of, backward_weight=weight)
    return values, device_of


def _step_costs(
    operations: npt.NDArray[np.int64],
    parts: list[Batch],
    subnetworks: Subnetworks,
    device_of: npt.NDArray[np.int64],
    profiles: list[DeviceProfile],
    unit_flops: float,
    settings: RunSettings,
    step: int,
) -> tuple[float, int]:
    """Return a step's wireless time, seconds, and the bytes that sub-networks send."""
    examples = np.array([len(part["labels"]) for part in parts])
    tokens = np.array([_num_tokens(part) for part in parts])
    hidden_size = base_of(subnetworks.layers[0].query).in_features
    compute = np.array(FULL_TUNING.compute)[operations] @ examples * unit_flops  # [S]
    messages = np.array(FULL_TUNING.traffic)[operations] @ tokens  # [S]
    sent_bytes = 4.0 * hidden_size * messages
    speed = np.array([profile.flops_per_s for profile in profiles])
    seconds = (compute / speed[device_of]).reshape(subnetworks.num_layers, -1)
    owners = device_of.reshape(subnetworks.num_layers, -1)
    compute_s = sum(
        float(np.bincount(owner, layer).max())
        for owner, layer in zip(owners, seconds, strict=True)
    )
    snr = rayleigh_snr(
        [profile.snr_db for profile in profiles],
        [profile.name for profile in profiles],
        server_round=step,
        seed=settings.seed,
    )
    rate_bps = full_band_rate_bps(settings.bandwidth_hz, snr)
    upload_s = float((8 * np.bincount(device_of, sent_bytes) / rate_bps).sum())
    return compute_s + upload_s, int(sent_bytes.sum())


def _num_tokens(part: Batch) -> int:
    """Return the tokens of a micro-batch: of its texts, or of its images' patches."""
    if "input_ids" in part:
        return part["input_ids"].numel()
    images, _, height, width = part["pixel_values"].shape
    return images * (height // PATCH_SIZE * (width // PATCH_SIZE) + 1)
