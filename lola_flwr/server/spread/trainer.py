"""Train a model that is spread over devices: the server's side, apart from a transport.

Devices hold the values of their sub-networks, and step them. They return them now and
then, so that a device that leaves takes no more along than what they learned since:
from the next step on its sub-networks are on the others.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from lola_flwr.arrays import Float32Array
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import (
    ADAPTER_TUNING,
    FULL_TUNING,
    Scores,
    place_subnetworks,
)
from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import fingerprint, load_values
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.randomness import rng_for
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.run.records import StepRecord
from lola_flwr.run.values import to_values
from lola_flwr.server.norm_limits import NormLimits
from lola_flwr.server.spread.audit import Auditor, Recompute
from lola_flwr.server.spread.exchange import (
    CountedExchange,
    Exchange,
    LieFound,
    PartFailed,
)
from lola_flwr.server.spread.held import HeldValues
from lola_flwr.server.spread.model import SpreadModel
from lola_flwr.server.spread.places import places_of, require_successive_layers
from lola_flwr.server.spread.plan import MicroBatches, SpreadState, StepPlan
from lola_flwr.server.spread.remote import SpreadGradient, spread_gradient
from lola_flwr.server.spread.returns import fetch, hand_over
from lola_flwr.server.spread.scoring import scores_after, step_record
from lola_flwr.server.state import restored
from lola_flwr.system.channel import Channel
from lola_flwr.wire.records import PartTask


class SpreadTrainer:
    """Trains a model whose sub-networks are spread over devices.

    What it knows is one frozen ``state``, the model's values and the optimizer's.

    Parameters
    ----------
    model
        The server's model, of which it computes normalisations, biases and dropout.
    partition
        Its blocks.
    optimizer
        Holds the trainable values. It steps those that belong to a layer as a whole,
        and devices step the others with their own, made with the same arguments.
    schedules
        Give each step its schedule. Their costs are replaced by those of what is
        trained.
    recompute
        Does what a device would, to audit it: on the model given here.
    num_groups
        Head groups that each layer is divided into (default: one for each head).
    micro_batches
        How large the micro-batches are.
    channel
        What the devices share.
    limits
        ``max_norm`` is for a step's gradient, ``factor`` for owners' of their losses.
    seed
        Seed of the run.

    Raises
    ------
    LayerNotUnderstood
        The model's layers cannot be cut into sub-networks, or do not follow each other.
    UserError
        The optimizer does not step each value by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: BlockPartition,
        *,
        optimizer: ServerOptimizer,
        schedules: StepSchedules,
        recompute: Recompute,
        num_groups: int | None = None,
        micro_batches: MicroBatches | None = None,
        channel: Channel | None = None,
        limits: NormLimits | None = None,
        seed: int = 0,
    ) -> None:
        self.partition = partition
        self.state = SpreadState()
        self._model = model
        self._subnetworks = find_subnetworks(model, partition, num_groups=num_groups)
        require_successive_layers(partition)
        self._held = HeldValues(optimizer, model, partition, self._subnetworks)
        costs = ADAPTER_TUNING if partition.layers else FULL_TUNING
        self._schedules = replace(schedules, costs=costs)
        self._micro_batches = micro_batches or MicroBatches()
        self._channel = channel or Channel()
        self._limits = limits or NormLimits()
        self._seed = seed
        self._auditor = Auditor(recompute, schedules)
        self._base_fingerprint = fingerprint(model, partition.frozen)
        # No other trainer's devices keep anything under it, whatever the seed.
        self._trainer_id = secrets.randbits(62)
        # How devices were last asked, and what was since the last record.
        self._since: CountedExchange | None = None

    @property
    def return_every(self) -> int:
        """Steps after which devices return what they hold."""
        return self._schedules.return_every

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
            Devices that are there. Those without a known profile are left out, those
            that lied, and those that rest after a failure, unless all do.

        Raises
        ------
        UserError
            No device has a usable profile, or the budgets let nothing run.
        """
        present = frozenset(device_ids)
        devices = self.state.usable(server_round, present)
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
            present=present,
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
        The step's record, with what was exchanged since the one before. Where a device
        did not do its part, no step is taken: it rests in those that follow, or, if it
        lied, in all, and what it held is as the server last knew it.
        """
        counted = CountedExchange(exchange, self._since)
        scores, failed = self.state.scores, dict[str, str]()
        outcomes: dict[str, float | None]
        try:
            record, scores = self._step(plan, counted, failed)
            outcomes = dict.fromkeys(counted.asked, None)
        except PartFailed as failure:
            lied = isinstance(failure, LieFound)
            self._held.lose(failure.reasons, lied=lied)
            self.state = self.state.excluding(failure.reasons if lied else ())
            # Where nobody knows whose fault it is, one rests that is drawn by lot.
            lot = rng_for(self._seed, "lot", plan.step).integers(len(plan.device_ids))
            blamed = failure.reasons or [plan.device_ids[lot]]
            outcomes = dict.fromkeys(blamed, 0.0)
            record = self.skip_round(plan.step, str(failure))
        outcomes |= dict.fromkeys(failed, 0.0)
        self.state = self.state.after(record, outcomes, scores)
        self._since = counted.anew()
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
        """Return the trainable parameters' current values, as views.

        Devices are asked for those that they have stepped since.
        """
        self._collect(moments=False)
        return self._held.known()

    def collect(self) -> None:
        """Have devices return all that they hold, moments included."""
        self._collect(moments=True)

    def start_from(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in the values to start from, or raise `UserError` if they do not fit."""
        self._collect(moments=False)
        if self._held.differ(values):
            self.collect()
            self._held.start_from(values)

    def _collect(self, *, moments: bool) -> None:
        if self._since is None:
            return
        failed = self._fetch(self._since, self._task(), moments=moments)
        fleet = self.state.fleet.after(self.server_round, dict.fromkeys(failed, 0.0))
        self.state = replace(self.state, fleet=fleet)

    def _fetch(
        self, exchange: CountedExchange, task: PartTask, *, moments: bool
    ) -> dict[str, str]:
        held, doubt = self._held, self._auditor.doubt
        unknown = held.unknown(moments=moments)
        return fetch(held, unknown, exchange, task, doubt, moments=moments)

    # --- checkpoints -----------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return all that the steps to come depend on, to be saved between steps."""
        self.collect()
        optimizer = self._held.snapshot()
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
        self._held.restore(Snapshot(snapshot.arrays, values["optimizer"]))
        self.state, self._trainer_id = state, secrets.randbits(62)

    # --- one step --------------------------------------------------------------------

    def _task(self, step: int | None = None, seed: int = 0) -> PartTask:
        """Return what all tasks of a step have in common."""
        return PartTask(
            kind="",
            step=self.state.server_round if step is None else step,
            base_fingerprint=self._base_fingerprint,
            seed=seed,
            num_groups=self._subnetworks.num_groups,
            trainer_id=self._trainer_id,
        )

    def _step(
        self, plan: StepPlan, exchange: CountedExchange, failed: dict[str, str]
    ) -> tuple[StepRecord, Scores | None]:
        """Take a step; return its record, and what was learned of the sub-networks.

        Who fails to return what it holds is added to ``failed``.
        """
        held, task, audit = self._held, self._task(plan.step), self._auditor
        places = places_of(plan.device_of, plan.device_ids, self._subnetworks)
        failed |= hand_over(held, places, plan.present, exchange, task, audit.doubt)
        audit.watch(plan.step, places)
        result = self._spread_gradient(plan, exchange)
        scale = result.scale(self._limits.max_norm)
        self.state = self.state.with_losses(result.limits)
        held.step(
            {name: (g * scale).numpy() for name, g in result.gradients.items()},
            plan.step,
            scale,
            result.places,
            [p for p, device in places.items() if not held.is_held(p, device)],
        )
        if plan.step % self.return_every == 0:
            failed |= self._fetch(exchange, task, moments=True)
        scores = self.state.scores
        if self._schedules.shared_budgets:
            scores = scores_after(scores, result, plan.operations)
        return step_record(
            plan,
            result,
            self._subnetworks,
            costs=self._schedules.costs,
            sent_bytes=exchange.received_bytes,
            channel=self._channel,
            time_s=self.state.wireless_s,
            seed=self._seed,
        ), scores

    def _spread_gradient(
        self, plan: StepPlan, exchange: CountedExchange
    ) -> SpreadGradient:
        """Compute a step's gradient as devices' parts of it come in, and audit it."""
        names, values = self._held.own_names, self._held.known()
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
            task=self._task(plan.step, seed=int(rng.integers(2**62))),
            held=self._held,
            note=self._auditor.note,
        )
        # Who begins is drawn, or some would never draw where not all micro-batches run.
        order = rng.permutation(len(plan.device_ids))
        first = (plan.step - 1) * self._schedules.micro_batches + 1
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.integers(2**62)))
            result = spread_gradient(
                spread,
                plan.owners(order, first),
                self._micro_batches.micro_batch_size,
                plan.operations,
                max_tokens=self._micro_batches.max_tokens,
                example_weight=self._micro_batches.example_weight,
                limits=self.state.loss_limits(self._limits.factor),
                compute=self._auditor.recompute,
            )
        self._auditor.check(spread)
        return result
