"""Train by LoLa-DEFT's rounds: devices that each train a block, and a server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from lola_flwr.allocation import InfeasibleAllocation, RoundMode
from lola_flwr.build import (
    AllocationOptions,
    Channel,
    DeviceOptions,
    RoundSettings,
    ServerStep,
    Transfer,
    coordinator_for,
)
from lola_flwr.costs.of_model import model_costs, with_pool, zeroth_order_costs
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.device.sampling import POOL_FACTOR, ChosenBatches, Rule
from lola_flwr.model.backprop import Batch
from lola_flwr.model.loading import load_values
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.selection import NEEDS_RESPONSE, Selection, selector_named
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.wire.records import Assignment
from lola_flwr.zeroth_order.mixing import ZerothOrder
from simulations.compare.measure import counted_flops, peak_bytes
from simulations.compare.methods import Method, Point, Report, RunSettings
from simulations.compare.tasks import Task

FloatArrays = Mapping[str, npt.NDArray[np.float32]]


def run_lola(task: Task, method: Method, settings: RunSettings, report: Report) -> None:
    """Train a task's model by rounds; ``report`` is called with what is evaluated."""
    model, layers = task.model, task.partition
    merged = method.kind == "fedavg-full"
    partition = layers.merged() if merged else layers
    sizes: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "sequence_length": task.sequence_length,
    }
    costs = model_costs(model, layers, **sizes, codec=method.codec, merged=merged)
    if method.rule:
        costs = with_pool(costs, model, layers, **sizes, pool_factor=POOL_FACTOR)
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
    selector = selector_named(
        method.selector,
        method.selector_options,
        partition=partition,
        weight_of=lambda name: parameters[name].float().numpy(force=True),
    )

    def coordinator_with(latency_target_s: float) -> Coordinator:
        selection = Selection(
            selector,
            latency_target_s=latency_target_s,
            response=_response(task) if method.selector == NEEDS_RESPONSE else None,
        )
        mode = RoundMode(participation="all" if merged else "needed")
        return coordinator_for(
            model,
            partition,
            costs=costs,
            batch_size=settings.batch_size,
            step=ServerStep(lr=task.lr, linear_decay_steps=settings.linear_decay_steps),
            settings=RoundSettings(
                channel=Channel(bandwidth_hz=settings.bandwidth_hz),
                transfer=Transfer(
                    codec=method.codec,
                    low_rank=LowRankProjection(**method.low_rank, seed=settings.seed)
                    if method.low_rank
                    else None,
                ),
                allocation=AllocationOptions(mode=mode),
                selection=selection,
                devices=DeviceOptions(zeroth_order=zeroth_order),
                seed=settings.seed,
            ),
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
                rule=cast(Rule, method.rule),
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
    wireless_s = 0.0
    # Following every tensor takes time: once for each block, however it is trained.
    measured: set[tuple[int, bool]] = set()

    def train(name: str, assignment: Assignment) -> DeviceReply:
        nonlocal flops, memory
        work = devices[name].train, assignment, coordinator.values()
        kind = assignment.block_index, assignment.direction_seed is None
        if kind not in measured:
            measured.add(kind)
            memory = max(memory, peak_bytes(model, *work))
        update, count = counted_flops(*work)
        tensors = {key: _npy(array) for key, array in update.arrays.items()}
        flops += count
        return DeviceReply(
            name, tensors, update.num_examples, update.report.to_record()
        )

    for server_round in range(1, settings.rounds + 1):
        try:
            plan = coordinator.plan_round(server_round, devices)
        except InfeasibleAllocation:
            pass  # of no block could a round be done in time: nobody is asked
        else:
            replies = [train(*asked) for asked in plan.assignments.items()]
            record = coordinator.complete_round(plan, replies)
            if record.refused:
                raise RuntimeError(f"round {server_round}: refused {record.refused}")
            payload += sum(block.received_bytes for block in record.blocks)
            wireless_s = record.wireless_s
        if settings.is_evaluated(server_round):
            state = coordinator.values()
            names = partition.trainable
            load_values(model, names, [state[name] for name in names])
            report(
                Point(
                    server_round,
                    task.evaluate(),
                    wireless_s,
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


def _npy(array: npt.NDArray[Any]) -> bytes:
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
