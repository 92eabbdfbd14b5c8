"""Train a model that is spread over devices: the server's side, apart from a transport.

The server holds the trainable values and the optimizer, so that a device that leaves
takes nothing along: from the next step on its sub-networks are on the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import (
    STATELESS_ADAPTER_TUNING,
    STATELESS_FULL_TUNING,
    place_subnetworks,
)
from lola_flwr.d2ft.scores import Scores
from lola_flwr.d2ft.steps import StepSchedules, compute_s, uploads_s
from lola_flwr.d2ft.subnetworks import (
    Branch,
    LayerNotUnderstood,
    base_of,
    find_subnetworks,
    layer_names,
    parameter_slices,
)
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import fingerprint, load_values
from lola_flwr.randomness import rng_for
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.run.records import RoundRecord
from lola_flwr.server.absences import Absences
from lola_flwr.server.fleet import Fleet
from lola_flwr.server.optimizer import ServerOptimizer
from lola_flwr.server.spread.exchange import (
    Exchange,
    PartFailed,
    PartReply,
    PartRequest,
)
from lola_flwr.server.spread.model import SpreadModel
from lola_flwr.server.spread.remote import spread_gradient
from lola_flwr.wire.records import PartTask

FloatArray = npt.NDArray[np.float32]


class SpreadTrainer:
    """Trains a model whose sub-networks are spread over devices.

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
    batch_size, max_tokens
        Examples of a micro-batch, and tokens of an example, at most.
    bandwidth_hz
        Total uplink bandwidth.
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
        batch_size: int = 8,
        max_tokens: int = 512,
        bandwidth_hz: float = 20e6,
        max_gradient_norm: float = 10.0,
        seed: int = 0,
    ) -> None:
        self.partition = partition
        self.server_round = 0  # the last complete step
        self.fleet = Fleet(seed=seed)
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
        self._batch_size = batch_size
        self._max_tokens = max_tokens
        self._bandwidth_hz = bandwidth_hz
        self._max_gradient_norm = max_gradient_norm
        self._seed = seed
        self._base_fingerprint = fingerprint(model, partition.frozen)
        self._wireless_s = 0.0
        self._scores: Scores | None = None

    def meet_devices(self, device_ids: Iterable[str]) -> list[str]:
        """Take note of who is there; return those whose profile is not known yet."""
        return self.fleet.meet(device_ids)

    def add_device(self, device_id: str, properties: Mapping[str, object]) -> None:
        """Take in a device's profile, or raise `InvalidProfile`; see `Fleet.add`."""
        self.fleet.add(device_id, properties)

    def step(
        self, step: int, device_ids: Iterable[str], exchange: Exchange
    ) -> RoundRecord:
        """Take one step, in which some devices take part.

        Parameters
        ----------
        step
            Step, from 1.
        device_ids
            Devices that are there. Those without a known profile are left out, and
            those that rest after a failure, unless all do.
        exchange
            Sends requests and returns the replies.

        Returns
        -------
        The step's record. Where a device did not do its part, nothing was changed; it
        rests in the steps that follow.

        Raises
        ------
        UserError
            No device has a usable profile, or the budgets let nothing run.
        """
        devices = self._available(step, device_ids)
        counted = _Counted(exchange)
        outcomes: dict[str, float | None] = {}
        try:
            record = self._step(step, devices, counted)
        except PartFailed as failure:
            # Where nobody knows whose fault it is, one rests that is drawn by lot.
            lot = rng_for(self._seed, "lot", step).integers(len(devices))
            outcomes = dict.fromkeys(failure.reasons or [devices[lot]], 0.0)
            record = self.skip(step, str(failure))
        else:
            outcomes = dict.fromkeys(counted.asked, None)
        record = replace(
            record,
            exchanges=counted.exchanges,
            sent_bytes=counted.sent_bytes,
            received_bytes=counted.received_bytes.total(),
        )
        names = {device: self.fleet.profiles[device].name for device in devices}
        self.fleet.absences = self.fleet.absences.after(
            step, {names[device]: lacked for device, lacked in outcomes.items()}
        )
        self._wireless_s = record.wireless_s
        self.server_round = step
        return record

    def skip(self, step: int, reason: str) -> RoundRecord:
        """Return the record of a step that was not taken."""
        self.server_round = step
        return RoundRecord(
            server_round=step,
            num_devices=len(self.fleet.profiles),
            wireless_s=self._wireless_s,
            skipped=reason,
        )

    def state(self) -> dict[str, FloatArray]:
        """Return the trainable parameters' current values, as views."""
        return self._optimizer.state()

    def start_from(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in the values to start from, or raise `UserError` if they do not fit."""
        own = {name: value.shape for name, value in self.state().items()}
        given = {name: value.shape for name, value in values.items()}
        if own != given:
            name = min(n for n in own | given if own.get(n) != given.get(n))
            raise UserError(
                f"Initial arrays: {name} has shape {given.get(name)}; expected "
                f"{own.get(name)}. Pass those of the model that the trainer was made "
                "for."
            )
        self._optimizer.load(values)

    def snapshot(self) -> Snapshot:
        """Return all that the steps to come depend on, to be saved between steps."""
        optimizer = self._optimizer.snapshot()
        scores = self._scores
        arrays = {} if scores is None else {"scores/fisher": scores.fisher}
        return Snapshot(
            {**optimizer.arrays, **arrays},
            {
                "base_fingerprint": self._base_fingerprint,
                "optimizer": optimizer.values,
                "step": self.server_round,
                "wireless_s": self._wireless_s,
                "absences": self.fleet.absences.to_values(),
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, in a trainer made with the same arguments.

        Raises
        ------
        UserError
            The snapshot is of another model.
        """
        values = snapshot.values
        if values["base_fingerprint"] != self._base_fingerprint:
            raise UserError(
                "The checkpoint is of a model with other frozen weights; use the "
                "model, revision and seed that it was made with."
            )
        self._optimizer.restore(Snapshot(snapshot.arrays, values["optimizer"]))
        self.server_round = values["step"]
        self._wireless_s = values["wireless_s"]
        self.fleet.absences = Absences.from_values(values["absences"])
        if "scores/fisher" in snapshot.arrays:
            self._scores = self._scores_of(snapshot.arrays["scores/fisher"])

    # --- one step ---------------------------------------------------------------------

    def _available(self, step: int, device_ids: Iterable[str]) -> list[str]:
        known = self.fleet.known(device_ids)
        if not known:
            raise UserError("No device has a usable profile.")
        absences, profiles = self.fleet.absences, self.fleet.profiles
        rested = [d for d in known if absences.memory_limit(step, profiles[d].name) > 0]
        return rested or known

    def _step(
        self, step: int, devices: Sequence[str], exchange: _Counted
    ) -> RoundRecord:
        profiles = [self.fleet.profiles[device] for device in devices]
        device_of = place_subnetworks(
            self._subnetworks.count, [profile.flops_per_s for profile in profiles]
        )
        operations = self._schedules.operations(step, device_of, self._scores)
        # What all sub-networks skip says nothing about them.
        operations = operations[:, (operations != Operation.SKIP).any(axis=0)]
        names = self.partition.trainable
        values = self.state()
        load_values(self._model, names, [values[name] for name in names])
        self._model.train()
        rng = rng_for(self._seed, "spread", step)
        spread = SpreadModel(
            model=self._model,
            partition=self.partition,
            subnetworks=self._subnetworks,
            device_of=device_of,
            device_ids=devices,
            exchange=exchange,
            task=PartTask(
                kind="",
                step=step,
                base_fingerprint=self._base_fingerprint,
                seed=int(rng.integers(2**62)),
                num_groups=self._subnetworks.num_groups,
            ),
        )
        # Each from the data of another device in turn; who begins is drawn, or some
        # would never have one where not all micro-batches run.
        order = rng.permutation(len(devices))
        first = (step - 1) * self._schedules.micro_batches
        numbers: dict[str, list[int]] = {}
        for m in range(operations.shape[1]):
            owner = devices[order[m % len(devices)]]
            numbers.setdefault(owner, []).append(first + m + 1)
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.integers(2**62)))
            result = spread_gradient(
                spread,
                numbers,
                self._batch_size,
                operations,
                max_tokens=self._max_tokens,
            )
        gradients = result.gradients
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        if not math.isfinite(norm):
            raise PartFailed({}, "the gradient is not finite")
        if norm > self._max_gradient_norm:
            for gradient in gradients.values():
                gradient *= self._max_gradient_norm / norm
        ran_fully = (operations == Operation.FULL).any(axis=1)
        self._optimizer.step({name: g.numpy() for name, g in gradients.items()}, step)
        if self._schedules.shared_budgets:
            self._scores = self._scores_of(self._fisher(gradients, ran_fully))
        seconds = compute_s(
            operations,
            device_of,
            [profile.flops_per_s for profile in profiles],
            num_layers=self._subnetworks.num_layers,
            forward_flops=np.array(result.tokens) * self._flops_per_token(),
            costs=self._schedules.costs,
        ) + uploads_s(
            [exchange.received_bytes[device] for device in devices],
            profiles,
            bandwidth_hz=self._bandwidth_hz,
            step=step,
            seed=self._seed,
        )
        return RoundRecord(
            server_round=step,
            num_devices=len(devices),
            wireless_s=self._wireless_s + seconds,
            round_s=seconds,
            observed_s=seconds,
            train_loss=result.loss,
        )

    def _flops_per_token(self) -> float:
        """Return what a sub-network's forward pass costs, but for attention itself."""
        first = self._subnetworks.layers[0]
        maps = [
            linear
            for branch in Branch
            for linear in (*first.branch(branch).into, first.branch(branch).back)
        ]
        weights = sum(base_of(linear).weight.numel() for linear in maps)
        return 2.0 * weights / self._subnetworks.num_groups

    def _fisher(
        self, gradients: dict[str, Tensor], ran_fully: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        """Return the sub-networks' Fisher information as far as it is known, [S, 1].

        That of those that did not run fully is what it was before, or the mean.
        """
        found = np.array(
            [
                sum(float(part.square().sum()) for part in parts)
                for parts in parameter_slices(self._subnetworks, gradients)
            ]
        )
        usual = np.full(found.size, found[ran_fully].mean() if ran_fully.any() else 1.0)
        before = usual if self._scores is None else self._scores.fisher[:, 0]
        return np.where(ran_fully, found, before)[:, None]

    def _scores_of(self, fisher: npt.NDArray[np.float64]) -> Scores:
        values = {name: torch.from_numpy(v) for name, v in self.state().items()}
        magnitude = [
            sum(float(part.abs().sum()) for part in parts)
            for parts in parameter_slices(self._subnetworks, values)
        ]
        return Scores(fisher, np.array(magnitude), np.zeros_like(fisher))


class _Counted:
    """An exchange whose messages are counted."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.asked: set[str] = set()
        self.exchanges = self.sent_bytes = 0
        self.received_bytes: Counter[str] = Counter()  # by device id

    def __call__(self, requests: Mapping[str, PartRequest]) -> Mapping[str, PartReply]:
        self.exchanges += 1
        self.asked |= requests.keys()
        self.sent_bytes += sum(
            array.nbytes for r in requests.values() for array in r.arrays.values()
        )
        replies = self._exchange(requests)
        for device, reply in replies.items():
            self.received_bytes[device] += sum(map(len, reply.arrays.values()))
        return replies
