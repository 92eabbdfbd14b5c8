"""Train a model that is spread over devices: the server's side, apart from a transport.

The server holds the trainable values and the optimizer, so that a device that leaves
takes nothing along: from the next step on its sub-networks are on the others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lola_flwr.arrays import Float32Array
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import (
    STATELESS_ADAPTER_TUNING,
    STATELESS_FULL_TUNING,
    Scores,
    place_subnetworks,
)
from lola_flwr.d2ft.steps import StepSchedules, compute_s, uploads_s
from lola_flwr.d2ft.subnetworks import LayerNotUnderstood, layer_names
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import fingerprint, load_values
from lola_flwr.randomness import rng_for
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.run.records import StepRecord
from lola_flwr.run.values import to_values
from lola_flwr.server.optimizer import ServerOptimizer
from lola_flwr.server.spread.exchange import CountedExchange, Exchange, PartFailed
from lola_flwr.server.spread.model import SpreadModel
from lola_flwr.server.spread.plan import MicroBatches, SpreadState, StepPlan
from lola_flwr.server.spread.remote import SpreadGradient, spread_gradient
from lola_flwr.server.spread.scoring import flops_per_token, scores_after
from lola_flwr.server.state import restored
from lola_flwr.system.channel import Channel
from lola_flwr.wire.records import PartTask


class SpreadTrainer:
    """Trains a model whose sub-networks are spread over devices.

    What it knows is one frozen value, ``state``; apart from it are the model's values
    and the optimizer's.

    Parameters
    ----------
    model
        The server's model, of which it computes normalisations, biases and dropout.
    partition
        Its blocks.
    optimizer
        Holds the trainable values, and steps them.
    schedules
        Give each step its schedule. Their costs are replaced by those of devices that
        compute forward anew on the way back.
    num_groups
        Head groups that each layer is divided into (default: one for each head).
    micro_batches
        How large the micro-batches are.
    channel
        What the devices share.
    max_gradient_norm
        A step's gradient is scaled down to this Euclidean norm.
    seed
        Seed of the run.

    Raises
    ------
    LayerNotUnderstood
        The model's layers cannot be cut into sub-networks, or do not follow each other.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: BlockPartition,
        *,
        optimizer: ServerOptimizer,
        schedules: StepSchedules,
        num_groups: int | None = None,
        micro_batches: MicroBatches | None = None,
        channel: Channel | None = None,
        max_gradient_norm: float = 10.0,
        seed: int = 0,
    ) -> None:
        self.partition = partition
        self.state = SpreadState()
        self._model = model
        self._subnetworks = find_subnetworks(model, partition, num_groups=num_groups)
        numbers = [int(name.rpartition(".")[2]) for name in layer_names(partition)]
        if numbers != [*range(numbers[0], numbers[0] + len(numbers))]:
            raise LayerNotUnderstood(
                f"The blocks are the layers {numbers}: only layers that follow each "
                "other can be spread over devices."
            )
        self._optimizer = optimizer
        self._schedules = replace(
            schedules,
            costs=STATELESS_ADAPTER_TUNING
            if partition.layers
            else STATELESS_FULL_TUNING,
        )
        self._micro_batches = micro_batches or MicroBatches()
        self._channel = channel or Channel()
        self._max_gradient_norm = max_gradient_norm
        self._seed = seed
        self._base_fingerprint = fingerprint(model, partition.frozen)

    @property
    def server_round(self) -> int:
        """Last complete step; 0 before the first."""
        return self.state.server_round

    # --- devices ---------------------------------------------------------------------

    def meet_devices(self, server_round: int, device_ids: Iterable[str]) -> list[str]:
        """Take note of who is there; return those to ask for their profiles."""
        there = list(device_ids)
        fleet = self.state.fleet.met(there)
        self.state = replace(self.state, fleet=fleet)
        return fleet.to_ask(server_round, there)

    def add_device(self, device_id: str, properties: Mapping[str, object]) -> None:
        """Take in a device's profile, or raise `InvalidProfile`."""
        fleet = self.state.fleet.with_device(device_id, properties)
        self.state = replace(self.state, fleet=fleet)

    def note_answers(
        self, server_round: int, asked: Iterable[str], answered: Collection[str]
    ) -> None:
        """Take note of which devices, of those asked for their profiles, answered."""
        fleet = self.state.fleet.answered(server_round, asked, answered)
        self.state = replace(self.state, fleet=fleet)

    # --- steps -----------------------------------------------------------------------

    def plan_round(self, server_round: int, device_ids: Iterable[str]) -> StepPlan:
        """Choose the devices of a step, and what their sub-networks do.

        Parameters
        ----------
        server_round
            Step, from 1.
        device_ids
            Devices that are there. Those without a known profile are left out, and
            those that rest after a failure, unless all do.

        Raises
        ------
        UserError
            No device has a usable profile, or the budgets let nothing run.
        """
        devices = self._available(server_round, device_ids)
        profiles = tuple(self.state.fleet.profiles[device] for device in devices)
        device_of = place_subnetworks(
            self._subnetworks.count, [profile.flops_per_s for profile in profiles]
        )
        operations = self._schedules.operations(
            server_round, device_of, self.state.scores
        )
        return StepPlan(
            step=server_round,
            device_ids=tuple(devices),
            profiles=profiles,
            device_of=device_of,
            # What all sub-networks skip says nothing about them.
            operations=operations[:, (operations != Operation.SKIP).any(axis=0)],
        )

    def complete_round(self, plan: StepPlan, exchange: Exchange) -> StepRecord:
        """Take a planned step.

        Parameters
        ----------
        plan
            The step's plan.
        exchange
            Sends requests and returns the replies.

        Returns
        -------
        The step's record. Where a device did not do its part, nothing was changed; it
        rests in the steps that follow.
        """
        devices, counted = plan.device_ids, CountedExchange(exchange)
        outcomes: dict[str, float | None] = {}
        scores = self.state.scores
        try:
            record, scores = self._step(plan, counted)
        except PartFailed as failure:
            # Where nobody knows whose fault it is, one rests that is drawn by lot.
            lot = rng_for(self._seed, "lot", plan.step).integers(len(devices))
            outcomes = dict.fromkeys(failure.reasons or [devices[lot]], 0.0)
            record = self.skip_round(plan.step, str(failure))
        else:
            outcomes = dict.fromkeys(counted.asked, None)
        names = {d: p.name for d, p in zip(devices, plan.profiles, strict=True)}
        fleet = self.state.fleet
        absences = fleet.absences.after(
            plan.step, {names[device]: lacked for device, lacked in outcomes.items()}
        )
        self.state = SpreadState(
            server_round=plan.step,
            wireless_s=record.wireless_s,
            fleet=replace(fleet, absences=absences),
            scores=scores,
        )
        return replace(
            record,
            exchanges=counted.exchanges,
            sent_bytes=counted.sent_bytes,
            received_bytes=counted.received_bytes.total(),
        )

    def skip_round(self, server_round: int, reason: str) -> StepRecord:
        """Return the record of a step that was not taken."""
        self.state = replace(self.state, server_round=server_round)
        return StepRecord(
            server_round=server_round,
            num_devices=len(self.state.fleet.profiles),
            wireless_s=self.state.wireless_s,
            skipped=reason,
        )

    # --- the model -------------------------------------------------------------------

    def values(self) -> dict[str, Float32Array]:
        """Return the trainable parameters' current values, as views."""
        return self._optimizer.state()

    def start_from(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in the values to start from, or raise `UserError` if they do not fit."""
        own = {name: value.shape for name, value in self.values().items()}
        given = {name: value.shape for name, value in values.items()}
        if own != given:
            name = min(n for n in own | given if own.get(n) != given.get(n))
            raise UserError(
                f"Initial arrays: {name} has shape {given.get(name)}; expected "
                f"{own.get(name)}. Pass those of the model that the trainer was made "
                "for."
            )
        self._optimizer.load(values)

    # --- checkpoints -----------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return all that the steps to come depend on, to be saved between steps."""
        optimizer = self._optimizer.snapshot()
        return Snapshot(
            optimizer.arrays,
            {
                "base_fingerprint": self._base_fingerprint,
                "optimizer": optimizer.values,
                "state": to_values(self.state),
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, in a trainer made with the same arguments.

        Raises
        ------
        UserError
            The snapshot is of another model, or of another version's state.
        """
        values = snapshot.values
        if values["base_fingerprint"] != self._base_fingerprint:
            raise UserError(
                "The checkpoint is of a model with other frozen weights; use the "
                "model, revision and seed that it was made with."
            )
        state = restored(SpreadState, values.get("state", {}))
        self._optimizer.restore(Snapshot(snapshot.arrays, values["optimizer"]))
        self.state = state

    # --- one step --------------------------------------------------------------------

    def _available(self, step: int, device_ids: Iterable[str]) -> list[str]:
        fleet = self.state.fleet
        known = fleet.known(device_ids)
        if not known:
            raise UserError("No device has a usable profile.")
        rested = [
            device
            for device in known
            if fleet.absences.memory_limit(step, fleet.profiles[device].name) > 0
        ]
        return rested or known

    def _step(
        self, plan: StepPlan, exchange: CountedExchange
    ) -> tuple[StepRecord, Scores | None]:
        """Take a step; return its record, and what was learned of the sub-networks."""
        result = self._spread_gradient(plan, exchange)
        gradients = result.gradients
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        if not math.isfinite(norm):
            raise PartFailed({}, "the gradient is not finite")
        if norm > self._max_gradient_norm:
            for gradient in gradients.values():
                gradient *= self._max_gradient_norm / norm
        self._optimizer.step(
            {name: g.numpy() for name, g in gradients.items()}, plan.step
        )
        scores = self.state.scores
        if self._schedules.shared_budgets:
            scores = scores_after(
                self._subnetworks,
                scores,
                gradients=gradients,
                ran_fully=(plan.operations == Operation.FULL).any(axis=1),
                values=self.values(),
            )
        seconds = compute_s(
            plan.operations,
            plan.device_of,
            [profile.flops_per_s for profile in plan.profiles],
            num_layers=self._subnetworks.num_layers,
            forward_flops=np.array(result.tokens) * flops_per_token(self._subnetworks),
            costs=self._schedules.costs,
        ) + uploads_s(
            [exchange.received_bytes[device] for device in plan.device_ids],
            plan.profiles,
            bandwidth_hz=self._channel.bandwidth_hz,
            step=plan.step,
            seed=self._seed,
        )
        record = StepRecord(
            server_round=plan.step,
            num_devices=len(plan.device_ids),
            wireless_s=self.state.wireless_s + seconds,
            round_s=seconds,
            observed_s=seconds,
            train_loss=result.loss,
        )
        return record, scores

    def _spread_gradient(
        self, plan: StepPlan, exchange: CountedExchange
    ) -> SpreadGradient:
        """Compute the gradient of a step, as the devices' parts of it come in."""
        names, values = self.partition.trainable, self.values()
        load_values(self._model, names, [values[name] for name in names])
        self._model.train()
        rng = rng_for(self._seed, "spread", plan.step)
        spread = SpreadModel(
            model=self._model,
            partition=self.partition,
            subnetworks=self._subnetworks,
            device_of=plan.device_of,
            device_ids=plan.device_ids,
            exchange=exchange,
            task=PartTask(
                kind="",
                step=plan.step,
                base_fingerprint=self._base_fingerprint,
                seed=int(rng.integers(2**62)),
                num_groups=self._subnetworks.num_groups,
            ),
        )
        # Each from the data of another device in turn; who begins is drawn, or some
        # would never have one where not all micro-batches run.
        devices = plan.device_ids
        order = rng.permutation(len(devices))
        first = (plan.step - 1) * self._schedules.micro_batches
        numbers: dict[str, list[int]] = {}
        for m in range(plan.operations.shape[1]):
            owner = devices[order[m % len(devices)]]
            numbers.setdefault(owner, []).append(first + m + 1)
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.integers(2**62)))
            return spread_gradient(
                spread,
                numbers,
                self._micro_batches.micro_batch_size,
                plan.operations,
                max_tokens=self._micro_batches.max_tokens,
                example_weight=self._micro_batches.example_weight,
            )
