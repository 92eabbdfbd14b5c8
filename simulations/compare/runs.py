"""Run one method on one task: LoLa-DEFT's rounds, or D2FT's steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lola_flwr.allocation import InfeasibleAllocation, RoundMode
from lola_flwr.clients.device import BlockDevice
from lola_flwr.clients.sampling import ChosenBatches
from lola_flwr.coordinator import Coordinator
from lola_flwr.d2ft import (
    FULL_TUNING,
    Budgets,
    find_subnetworks,
    operation_values,
    place_subnetworks,
    schedule_subnetworks,
    scheduled_gradient,
    score_subnetworks,
)
from lola_flwr.d2ft.scores import Scores
from lola_flwr.d2ft.subnetworks import Subnetworks, base_of
from lola_flwr.low_rank import LowRankProjection
from lola_flwr.model_setup import coordinator_for, model_costs, zeroth_order_costs
from lola_flwr.models import load_values
from lola_flwr.protocol import Assignment
from lola_flwr.randomness import rng_for
from lola_flwr.replies import DeviceReply
from lola_flwr.selection import NEEDS_RESPONSE, Selection, selector_named
from lola_flwr.server_optimizer import ServerOptimizer
from lola_flwr.system.channel import full_band_rate_bps, rayleigh_snr
from lola_flwr.system.devices import DeviceProfile, simulated_device
from lola_flwr.truncated_backprop import Batch
from lola_flwr.zeroth_order.mixing import ZerothOrder
from simulations.compare.measure import counted_flops, peak_bytes
from simulations.compare.tasks import PATCH_SIZE, Task

FloatArrays = Mapping[str, npt.NDArray[np.float32]]

# Rounds in which the devices' memory is measured: following every tensor takes time.
_MEMORY_ROUNDS = 2


@dataclass(frozen=True)
class Method:
    """A way to spend a round.

    Parameters
    ----------
    kind
        "lola": LoLa-DEFT's rounds; "fedavg-full": the same with the whole stack as the
        one block, which every device trains; "d2ft": the model is spread over the
        devices, and runs under D2FT's schedule.
    selector, selector_options
        Which blocks a round trains.
    latency_target
        Time that a round may take, in terms of the median round of all blocks.
    zeroth_order
        Options of `ZerothOrder`; empty: all devices back-propagate.
    rule
        How mini-batches are chosen, as in `ChosenBatches`; "": at random.
    low_rank
        Rank and period of a `LowRankProjection`; empty: gradients travel whole.
    codec
        Codec of the gradients.
    compute, traffic, solver, num_groups, micro_batches, refresh, backward_weight
        Of D2FT: budgets as shares of the full cost, solver, head groups of a layer,
        micro-batches of a step, steps between scorings, worth of a backward pass.
    """

    kind: str = "lola"
    selector: str = "all"
    selector_options: Mapping[str, Any] = field(default_factory=dict)
    latency_target: float = math.inf
    zeroth_order: Mapping[str, Any] = field(default_factory=dict)
    rule: str = ""
    low_rank: Mapping[str, int] = field(default_factory=dict)
    codec: str = "fp32"
    compute: float = 1.0
    traffic: float = 1.0
    solver: str = "knapsack"
    num_groups: int | None = None
    micro_batches: int = 5
    refresh: int = 25
    backward_weight: float = 1.0


@dataclass(frozen=True)
class RunSettings:
    """What all runs of a comparison have in common.

    Parameters
    ----------
    rounds, eval_every
        Rounds of a run, and after how many of them the model is evaluated.
    num_devices
        Devices K.
    batch_size
        Examples of a device's mini-batch. D2FT, whose devices share one model, takes as
        many examples a step as all of LoLa-DEFT's devices together.
    bandwidth_hz
        Uplink.
    seed
        Seed of fleet, channel, split, batches and head.
    """

    rounds: int = 30
    eval_every: int = 5
    num_devices: int = 6
    batch_size: int = 32
    bandwidth_hz: float = 20e6
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """Where a run is after some rounds; all but the metrics are sums since its start.

    ``memory_bytes`` is the most that one device has used beyond the weights.
    """

    server_round: int
    metrics: Mapping[str, float]
    wireless_s: float
    flops: int
    payload_bytes: int
    memory_bytes: int


Report = Callable[[Point], object]


def run_method(
    task: Task, method: Method, settings: RunSettings, report: Report
) -> list[Point]:
    """Run a method; ``report`` is called with each evaluated point.

    The task's model ends with the values that were learned.
    """
    run = _run_d2ft if method.kind == "d2ft" else _run_lola
    points: list[Point] = []

    def on_point(point: Point) -> None:
        points.append(point)
        report(point)

    run(task, method, settings, on_point)
    return points


def _run_lola(
    task: Task, method: Method, settings: RunSettings, report: Report
) -> None:
    model, layers = task.model, task.partition
    merged = method.kind == "fedavg-full"
    partition = layers.merged() if merged else layers
    sizes: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "sequence_length": task.sequence_length,
    }
    costs = model_costs(model, layers, **sizes, codec=method.codec, merged=merged)
    zeroth_order = None
    if method.zeroth_order:
        count = int(
            method.zeroth_order.get("num_directions", ZerothOrder.num_directions)
        )
        zeroth_order = ZerothOrder(
            costs=zeroth_order_costs(model, layers, **sizes, num_directions=count),
            **method.zeroth_order,
        )
    parameters = dict(model.named_parameters())
    start = {name: parameters[name].numpy(force=True) for name in partition.trainable}
    selector = selector_named(
        method.selector, method.selector_options, partition=partition, values=start
    )

    def coordinator_with(latency_target_s: float) -> Coordinator:
        return coordinator_for(
            model,
            partition,
            costs=costs,
            bandwidth_hz=settings.bandwidth_hz,
            batch_size=settings.batch_size,
            lr=task.lr,
            mode=RoundMode(participation="all" if merged else "needed"),
            selection=Selection(selector, latency_target_s=latency_target_s),
            response=_response(task) if method.selector == NEEDS_RESPONSE else None,
            zeroth_order=zeroth_order,
            low_rank=(
                LowRankProjection(**method.low_rank, seed=settings.seed)
                if method.low_rank
                else None
            ),
            codec=method.codec,
            seed=settings.seed,
        )

    def device(index: int) -> BlockDevice:
        profile = simulated_device(index, seed=settings.seed)

        def draw(server_round: int, batch_size: int) -> Batch:
            return task.draw(index, server_round, batch_size)

        def compute_s(assignment: Assignment) -> float:
            own = costs
            if zeroth_order is not None and assignment.direction_seed is not None:
                own = zeroth_order.costs
            return float(own.flops[assignment.block_index] / profile.flops_per_s)

        source = draw
        if method.rule:
            source = ChosenBatches(
                source=draw,
                load_model=lambda: model,
                rule=method.rule,
            ).__call__
        return BlockDevice(
            profile=profile,
            load_model=lambda: (model, partition),
            batch_source=source,
            seed=settings.seed,
            simulated_compute_s=compute_s,
        )

    devices = {f"id-{i}": device(i) for i in range(settings.num_devices)}

    def met(coordinator: Coordinator) -> Coordinator:
        for name, one in devices.items():
            coordinator.add_device(name, one.profile.to_properties())
        return coordinator

    target_s = math.inf
    if math.isfinite(method.latency_target):
        unhurried = met(coordinator_with(math.inf))
        rounds = range(1, settings.rounds + 1)
        whole_s = [unhurried.plan_round(r, devices).allocation.round_s for r in rounds]
        target_s = method.latency_target * float(np.median(whole_s))
    coordinator = met(coordinator_with(target_s))
    flops = payload = memory = 0
    for server_round in range(1, settings.rounds + 1):
        try:
            plan = coordinator.plan_round(server_round, devices)
        except InfeasibleAllocation:
            continue  # of no block could a round be done in time: nobody is asked
        values = coordinator.state()
        replies = []
        for name, assignment in plan.assignments.items():
            train = devices[name].train
            if server_round <= _MEMORY_ROUNDS:
                memory = max(memory, peak_bytes(train, assignment, values))
            update, count = counted_flops(train, assignment, values)
            tensors = {key: _npy(array) for key, array in update.arrays.items()}
            flops += count
            payload += sum(map(len, tensors.values()))
            replies.append(
                DeviceReply(
                    name, tensors, update.num_examples, update.report.to_record()
                )
            )
        record = coordinator.complete_round(plan, replies)
        if record.refused:
            raise RuntimeError(f"round {server_round}: refused {record.refused}")
        if _is_evaluated(server_round, settings):
            state = coordinator.state()
            names = partition.trainable
            load_values(model, names, [state[name] for name in names])
            report(
                Point(
                    server_round,
                    task.evaluate(),
                    record.wireless_s,
                    flops,
                    payload,
                    memory,
                )
            )


def _response(task: Task) -> Callable[[FloatArrays], float]:
    """Give the loss of some values on the server's own examples."""

    def response(values: FloatArrays) -> float:
        names = task.partition.trainable
        load_values(task.model, names, [values[name] for name in names])
        task.model.eval()
        with torch.inference_mode():
            return float(task.model(**task.proxy).loss)

    return response


def _run_d2ft(
    task: Task, method: Method, settings: RunSettings, report: Report
) -> None:
    """Train a model whose sub-networks are spread over the devices, in one process.

    A step's wireless time is that of
    the layers one after the other, each as long as its slowest device, and of the
    activations and gradients that cross a border, each over the sender's whole band.
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
            if (step - 1) % method.refresh == 0:
                scores, count = counted_flops(
                    score_subnetworks, model, subnetworks, names, parts[:1]
                )
                flops += count
            operations = _operations(scores, device_of, budgets, method, settings, step)

            work = model, subnetworks, names, parts, operations
            if step == 1:
                memory = peak_bytes(scheduled_gradient, *work)
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
        if _is_evaluated(step, settings):
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


def _operations(
    scores: Scores,
    device_of: npt.NDArray[np.int64],
    budgets: Budgets,
    method: Method,
    settings: RunSettings,
    step: int,
) -> npt.NDArray[np.int64]:
    """Schedule a step by the last scores; between its micro-batches chance decides.

    Their own gradient scores would take a backward pass over each, which is what the
    schedule is to save.
    """
    shape = (scores.fisher.shape[0], method.micro_batches)
    chance = rng_for(settings.seed, "ties", step).random(shape)
    spread = Scores(np.broadcast_to(scores.fisher, shape), scores.magnitude, chance)
    return schedule_subnetworks(
        operation_values(spread, backward_weight=method.backward_weight),
        device_of,
        budgets,
        solver=method.solver,
    )


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
    """Return a step's wireless time, seconds, and the bytes that cross borders."""
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


def _is_evaluated(server_round: int, settings: RunSettings) -> bool:
    return server_round % settings.eval_every == 0 or server_round == settings.rounds


def _npy(array: npt.NDArray[Any]) -> bytes:
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
