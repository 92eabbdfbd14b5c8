"""Train by rounds of devices that take several steps of their own and upload values.

The fleet, the channel, the samples and the evaluation are those of LoLa-DEFT's rounds,
and the band is shared best: so that the last device has uploaded as early as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lola_flwr.allocation.shares import best_shares
from lola_flwr.arrays import Float32Arrays, Float64Array, IntArray
from lola_flwr.build import Channel
from lola_flwr.costs.of_model import model_costs
from lola_flwr.model.backprop import Batch, model_loss, only_trainable, train_mode
from lola_flwr.model.loading import load_values
from lola_flwr.randomness import rng_for
from lola_flwr.system.channel import rates_up_bps
from lola_flwr.system.devices import FleetRanges, simulated_device
from lola_flwr.system.own_channel import Moment
from lola_flwr.wire.codec import codec_named
from simulations.compare.block_coordinate import a_block_each, one_block_in_turn
from simulations.compare.contender import (
    Contender,
    Fleet,
    Part,
    Update,
    as_received,
)
from simulations.compare.depth_limited import depth_limited
from simulations.compare.fedavg import fedavg
from simulations.compare.flexlora import flexlora
from simulations.compare.jcpba import jcpba
from simulations.compare.measure import counted_flops, peak_bytes
from simulations.compare.methods import Method, Point, Report, RunSettings
from simulations.compare.pruned_model import prunable, pruned
from simulations.compare.tasks import Task

CONTENDERS: dict[str, Callable[[Fleet], Contender]] = {
    "fedavg": fedavg,
    "flexlora": flexlora,
    "depth-limited": depth_limited,
    "one-block-in-turn": one_block_in_turn,
    "a-block-each": a_block_each,
    "jcpba": jcpba,
}


def run_local(
    task: Task, method: Method, settings: RunSettings, report: Report
) -> None:
    """Train a task's model; ``report`` is called with what is evaluated."""
    fleet = _fleet(task, method, settings)
    contender = CONTENDERS[method.kind](fleet)
    effort = _Effort(task, method, settings)
    sent_as = _transfer(method.codec)
    values: Float32Arrays = _values(task)
    late: Mapping[int, Update] = {}
    previous: Mapping[int, Part] = {}
    payload, spent = 0, _Spent(0.0, 0.0)
    for server_round in range(1, settings.rounds + 1):
        rates_bps = _rates_bps(fleet, settings, server_round, spent.seconds)
        parts = contender.parts(server_round, rates_bps)
        sent = previous if contender.overlaps else parts
        spent += _round_cost(fleet, rates_bps, parts, sent)
        updates = {}
        for device, part in parts.items():
            given = contender.given(device, values)
            update = effort.update(server_round, device, part, given)
            updates[device] = sent_as(update, given)
        arrived, late = (late, updates) if contender.overlaps else (updates, late)
        values = contender.merged(values, arrived)
        payload += sum(part.sent_bytes for part in sent.values())
        previous = parts
        if settings.is_evaluated(server_round):
            load_values(task.model, list(values), list(values.values()))
            metrics = task.evaluate()
            report(
                Point(
                    server_round,
                    metrics,
                    spent.seconds,
                    effort.flops,
                    payload,
                    effort.memory,
                    spent.joules,
                )
            )
            if settings.is_reached(metrics):
                return


def _transfer(codec: str) -> Callable[[Update, Float32Arrays], Update]:
    """Return what becomes of an update on its way; values themselves travel in fp32."""
    if codec == "fp32":
        return lambda update, _: update
    return partial(as_received, codec=codec_named(codec))


@dataclass(frozen=True)
class _Spent:
    """Wireless time, and energy; None where a device does not say what it draws."""

    seconds: float
    joules: float | None

    def __add__(self, other: _Spent) -> _Spent:
        known = self.joules is not None and other.joules is not None
        return _Spent(
            self.seconds + other.seconds,
            self.joules + other.joules if known else None,  # type: ignore[operator]
        )


def _fleet(task: Task, method: Method, settings: RunSettings) -> Fleet:
    ranges, count = FleetRanges().with_powers(), settings.num_devices
    counted = partial(
        model_costs,
        task.model,
        task.partition,
        batch_size=settings.batch_size,
        sequence_length=task.sequence_length,
    )
    return Fleet(
        method=method,
        partition=task.partition,
        costs=counted(),
        shapes={name: value.shape for name, value in _values(task).items()},
        profiles=[
            simulated_device(i, seed=settings.seed, ranges=ranges) for i in range(count)
        ],
        num_examples=[task.num_examples(i) for i in range(count)],
        model=task.model,
        counted=partial(counted, merged=True),
    )


def _values(task: Task) -> dict[str, Any]:
    """Return a copy of what is trained."""
    parameters = dict(task.model.named_parameters())
    names = task.partition.trainable
    return {name: parameters[name].numpy(force=True).copy() for name in names}


def _rates_bps(
    fleet: Fleet, settings: RunSettings, server_round: int, begins_s: float
) -> Float64Array:
    """Return each device's rate up over the whole band in a round, shape [K]."""
    return rates_up_bps(
        fleet.profiles,
        Channel(bandwidth_hz=settings.bandwidth_hz),
        Moment(server_round, begins_s, settings.seed),
    )


def _round_cost(
    fleet: Fleet,
    rates_bps: Float64Array,
    parts: Mapping[int, Part],
    sent: Mapping[int, Part],
) -> _Spent:
    """Return what a round takes in which some compute, and some send.

    Who sends what it has just computed begins when that is done; the values of an
    earlier round are sent meanwhile.
    """
    count = len(fleet.profiles)
    compute_s, sends_bits, begins = np.zeros(count), np.zeros(count), np.zeros(count)
    for device, part in parts.items():
        speed = fleet.profiles[device].flops_per_s
        compute_s[device] = fleet.method.local_steps * part.step_flops / speed
    for device, part in sent.items():
        sends_bits[device] = part.payload_bits
        begins[device] = compute_s[device] if sent is parts else 0.0
    upload_s = _uploads_s(begins, sends_bits / rates_bps)
    joules = [
        profile.joules(float(compute_s[k]), float(upload_s[k]))
        for k, profile in enumerate(fleet.profiles)
    ]
    ends = np.maximum(compute_s, begins + upload_s)
    known = None if None in joules else sum(j for j in joules if j is not None)
    return _Spent(float(ends.max()), known)


def _uploads_s(begins_s: Float64Array, full_band_s: Float64Array) -> Float64Array:
    """Return how long each device sends under the best shares; 0 without anything."""
    upload_s = np.zeros_like(full_band_s)
    sending = full_band_s > 0
    if sending.any():
        shares = best_shares(begins_s[sending], full_band_s[sending])
        upload_s[sending] = full_band_s[sending] / shares
    return upload_s


class _Effort:
    """Has devices train, and follows what that takes: operations, peak of memory."""

    def __init__(self, task: Task, method: Method, settings: RunSettings) -> None:
        self.flops = self.memory = 0
        self._task, self._steps, self._settings = task, method.local_steps, settings
        # Following every tensor takes time: once for each part, and again where less of
        # it is pruned than ever before, since that takes more.
        self._measured: dict[tuple[str, ...], float] = {}
        self._maps: Mapping[str, str] | None = None

    def update(
        self, server_round: int, device: int, part: Part, values: Float32Arrays
    ) -> Update:
        """Return what a device ends with that starts from some values."""
        task, settings = self._task, self._settings
        first = (server_round - 1) * self._steps + 1
        batches = [
            task.draw(device, first + step, settings.batch_size)
            for step in range(self._steps)
        ]
        left = 1 - (server_round - 1) / settings.rounds if settings.decay else 1.0
        seed = int(
            rng_for(settings.seed, "dropout", server_round, device).integers(2**62)
        )
        work = task.model, part.names, batches, task.lr * left, seed
        if part.pruning_rate < self._measured.get(part.names, np.inf):
            self._measured[part.names] = part.pruning_rate
            # Two steps: from the second on the optimizer has all that it keeps.
            few = (*work[:2], batches[:2], *work[3:])
            with self._device_model(part, values):
                self.memory = max(self.memory, peak_bytes(task.model, train, *few))
        with self._device_model(part, values) as rows:
            trained, count = counted_flops(train, *work)
        self.flops += count
        return Update(trained, task.num_examples(device), rows)

    @contextmanager
    def _device_model(
        self, part: Part, values: Float32Arrays
    ) -> Iterator[Mapping[str, IntArray]]:
        """Give the model a device's values, pruned as its part says; give the rows."""
        model = self._task.model
        load_values(model, list(values), list(values.values()))
        if not part.pruning_rate:
            yield {}
            return
        if self._maps is None:
            self._maps = prunable(model, self._task.partition)
        with pruned(model, self._maps, part.pruning_rate) as rows:
            yield rows


def train(
    model: nn.Module, names: tuple[str, ...], batches: list[Batch], lr: float, seed: int
) -> dict[str, Any]:
    """Take a step of AdamW on each batch; return the trained values.

    The optimizer is a new one. Layers below the first that is trained are only run.
    """
    with torch.random.fork_rng(), only_trainable(model, names) as trained:
        torch.manual_seed(seed)
        train_mode(model)
        optimizer = torch.optim.AdamW(trained.values(), lr=lr)
        for batch in batches:
            optimizer.zero_grad()
            model_loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.zero_grad()
        return {name: p.numpy(force=True).copy() for name, p in trained.items()}
