"""Train by LoLa-DEFT's rounds: devices that each train a block, and a server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lola_flwr.allocation import InfeasibleAllocation, RoundMode
from lola_flwr.arrays import Float32Arrays
from lola_flwr.build import (
    AllocationOptions,
    Channel,
    DeviceOptions,
    RoundSettings,
    ServerStep,
    Transfer,
    coordinator_for,
)
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.costs.of_model import model_costs, with_pool, zeroth_order_costs
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.device.loss_history import HistoryBatches
from lola_flwr.device.sampler_options import History, Rule, sampler_named
from lola_flwr.device.sampling import ChosenBatches
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import load_values
from lola_flwr.planning import BATCH_SIZES
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.selection import NEEDS_RESPONSE, Selection, selector_named
from lola_flwr.system.devices import FleetRanges, simulated_device
from lola_flwr.wire.codec import AUTO
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.wire.records import Assignment
from lola_flwr.zeroth_order.forward_costs import forward_mode_costs
from lola_flwr.zeroth_order.mixing import ZerothOrder
from simulations.compare.measure import counted_flops, peak_bytes
from simulations.compare.methods import Method, Point, Report, RunSettings
from simulations.compare.tasks import Task


def run_lola(task: Task, method: Method, settings: RunSettings, report: Report) -> None:
    """Train a task's model by rounds; ``report`` is called with what is evaluated."""
    with TemporaryDirectory() as kept:
        _train(_Run.of(task, method, settings), Path(kept), report)


def _train(run: _Run, kept: Path, report: Report) -> None:
    """Train by rounds of devices that keep what codecs leave out in a directory."""
    task, settings = run.task, run.settings
    devices = {f"id-{i}": _device(run, i, kept) for i in range(settings.num_devices)}
    coordinator = _coordinator(run, devices, _latency_target_s(run, devices))
    effort = _Effort(task.model)
    payload, wireless_s, joules = 0, 0.0, None
    for server_round in range(1, settings.rounds + 1):
        try:
            plan = coordinator.plan_round(server_round, devices)
        except InfeasibleAllocation:
            pass  # of no block could a round be done in time: nobody is asked
        else:
            values = coordinator.values()
            replies = [
                effort.reply(name, devices[name], assignment, values)
                for name, assignment in plan.assignments.items()
            ]
            record = coordinator.complete_round(plan, replies)
            if record.refused:
                raise RuntimeError(f"round {server_round}: refused {record.refused}")
            payload += sum(block.received_bytes for block in record.blocks)
            wireless_s, joules = record.wireless_s, record.joules
        if settings.is_evaluated(server_round):
            values, names = coordinator.values(), run.partition.trainable
            load_values(task.model, names, [values[name] for name in names])
            metrics = task.evaluate()
            report(
                Point(
                    server_round,
                    metrics,
                    wireless_s,
                    effort.flops,
                    payload,
                    effort.memory,
                    joules,
                )
            )
            if settings.is_reached(metrics):
                return


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """What a run's coordinator and devices are made of."""

    task: Task
    method: Method
    settings: RunSettings
    partition: BlockPartition
    costs: BlockCosts
    zeroth_order: ZerothOrder | None

    @classmethod
    def of(cls, task: Task, method: Method, settings: RunSettings) -> _Run:
        model, layers = task.model, task.partition
        sizes: dict[str, Any] = {
            "batch_size": _largest_batch(method, settings),
            "sequence_length": task.sequence_length,
        }
        merged = method.kind == "fedavg-full"
        # What travels in "auto" the coordinator counts; it is part of no round's costs.
        codec = "fp32" if method.codec == AUTO else method.codec
        costs = model_costs(
            model,
            layers,
            **sizes,
            codec=codec,
            merged=merged,
            activations=method.activations,
        )
        rule = sampler_named(method.sampler, method.sampler_options)
        if isinstance(rule, Rule):
            pool_factor = rule.pool_factor
            costs = with_pool(costs, model, layers, **sizes, pool_factor=pool_factor)
        zeroth_order = None
        if method.zeroth_order:
            usual = ZerothOrder.num_directions
            count = int(method.zeroth_order.get("num_directions", usual))
            moves = method.zeroth_order.get("perturbation") != 0
            cost_of = zeroth_order_costs if moves else forward_mode_costs
            zeroth_order = ZerothOrder(
                costs=cost_of(model, layers, **sizes, num_directions=count),
                **method.zeroth_order,
            )
        return cls(
            task=task,
            method=method,
            settings=settings,
            partition=layers.merged() if merged else layers,
            costs=costs,
            zeroth_order=zeroth_order,
        )

    def compute_s(self, assignment: Assignment, flops_per_s: float) -> float:
        """Return how long a device of some speed computes."""
        costs = self.costs
        if self.zeroth_order is not None and assignment.direction_seed is not None:
            costs = self.zeroth_order.costs
        if self.method.chooses_batches:
            costs = costs.at(assignment.batch_size)
        flops = costs.joined([assignment.blocks]).flops[assignment.block_index]
        return float(flops / flops_per_s)


def _largest_batch(method: Method, settings: RunSettings) -> int:
    return max(BATCH_SIZES) if method.chooses_batches else settings.batch_size


def _coordinator(
    run: _Run, devices: Mapping[str, BlockDevice], latency_target_s: float
) -> Coordinator:
    """Make a coordinator that knows some devices."""
    task, method, settings = run.task, run.method, run.settings
    parameters = dict(task.model.named_parameters())
    selector = selector_named(
        method.selector,
        method.selector_options,
        partition=run.partition,
        weight_of=lambda name: parameters[name].float().numpy(force=True),
    )
    low_rank = None
    if method.low_rank:
        low_rank = LowRankProjection(**method.low_rank, seed=settings.seed)
    is_merged = method.kind == "fedavg-full"
    mode = RoundMode(participation="all" if is_merged else method.participation)
    coordinator = coordinator_for(
        task.model,
        run.partition,
        costs=run.costs,
        batch_size=_largest_batch(method, settings),
        step=ServerStep(lr=task.lr, linear_decay_steps=settings.linear_decay_steps),
        settings=RoundSettings(
            channel=Channel(bandwidth_hz=settings.bandwidth_hz),
            transfer=Transfer(codec=method.codec, low_rank=low_rank, rank=method.rank),
            allocation=AllocationOptions(
                mode=mode, batch_sizes=BATCH_SIZES if method.chooses_batches else ()
            ),
            selection=Selection(
                selector,
                latency_target_s=latency_target_s,
                response=_response(task) if method.selector == NEEDS_RESPONSE else None,
            ),
            devices=DeviceOptions(zeroth_order=run.zeroth_order),
            seed=settings.seed,
        ),
    )
    for name, device in devices.items():
        coordinator.add_device(name, device.profile.to_properties())
    return coordinator


def _latency_target_s(run: _Run, devices: Mapping[str, BlockDevice]) -> float:
    """Return the method's part of what a round of all blocks takes, median."""
    if not math.isfinite(run.method.latency_target):
        return math.inf
    unhurried = _coordinator(run, devices, math.inf)
    rounds = range(1, run.settings.rounds + 1)
    whole_s = [unhurried.plan_round(r, devices).allocation.round_s for r in rounds]
    return run.method.latency_target * float(np.median(whole_s))


def _device(run: _Run, index: int, kept: Path) -> BlockDevice:
    """Make one of the simulated devices, which share the model."""
    ranges = FleetRanges().with_powers()
    profile = simulated_device(index, seed=run.settings.seed, ranges=ranges)
    if run.method.chooses_batches:
        profile = replace(profile, num_examples=run.task.num_examples(index))

    def draw(server_round: int, batch_size: int) -> Batch:
        return run.task.draw(index, server_round, batch_size)

    device = BlockDevice(
        profile=profile,
        load_model=lambda: (run.task.model, run.partition),
        batch_source=draw,
        store=kept,
        activations=run.method.activations,
        seed=run.settings.seed,
        simulated_compute_s=lambda assignment: run.compute_s(
            assignment, profile.flops_per_s
        ),
    )
    rule = sampler_named(run.method.sampler, run.method.sampler_options)
    if isinstance(rule, History):
        return HistoryBatches(
            num_examples=run.task.num_examples(index),
            examples=partial(run.task.examples, index),
            store=kept,
            device=profile.name,
            rule=rule,
            seed=run.settings.seed,
        ).on(device)
    if rule is None:
        return device
    chosen = ChosenBatches(source=draw, load_model=lambda: run.task.model, rule=rule)
    return replace(device, batch_source=chosen)


class _Effort:
    """Has devices train, and follows what that takes: operations, peak of memory."""

    def __init__(self, model: nn.Module) -> None:
        self.flops = self.memory = 0
        self._model = model
        # Following every tensor takes time: once for each block, however trained.
        self._measured: set[tuple[tuple[int, ...], bool]] = set()

    def reply(
        self,
        name: str,
        device: BlockDevice,
        assignment: Assignment,
        values: Float32Arrays,
    ) -> DeviceReply:
        """Return what a device sends back."""
        kind = assignment.blocks, assignment.direction_seed is None
        if kind not in self._measured:
            self._measured.add(kind)
            peak = peak_bytes(self._model, device.train, assignment, values)
            self.memory = max(self.memory, peak)
        update, count = counted_flops(device.train, assignment, values)
        self.flops += count
        tensors = {key: _npy(array) for key, array in update.arrays.items()}
        return DeviceReply(
            name, tensors, update.num_examples, update.report.to_record()
        )


def _response(task: Task) -> Callable[[Float32Arrays], float]:
    """Give the loss of some values on the server's own examples."""

    def response(values: Float32Arrays) -> float:
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
