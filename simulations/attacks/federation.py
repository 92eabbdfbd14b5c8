"""A run in which some devices are hostile; the server and the devices are real ones.

The server is the `Coordinator` with all that a run's state is, the devices are
`BlockDevice`s; neither Flower nor a network is between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import nn

from lola_flwr.arrays import Float32Arrays
from lola_flwr.build import (
    AllocationOptions,
    Channel,
    DeviceOptions,
    NormLimits,
    RoundSettings,
    ServerStep,
    Transfer,
    coordinator_for,
    model_costs,
)
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.device.encoding import encode_update
from lola_flwr.device.store import Residuals
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.example_gradients import example_gradients
from lola_flwr.model.loading import load_values
from lola_flwr.randomness import rng_for
from lola_flwr.run.records import RoundRecord
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.state import RunState
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.packing import GRADIENTS, unpack
from lola_flwr.wire.records import Assignment
from simulations.attacks.attack import HONEST, Attack, Gang, Turn, npy
from simulations.attacks.small import LENGTH, SmallTask, small_model

# The model is evaluated so often, every so many rounds, the last time after the last.
_EVALUATIONS, _EVERY = 5, 5


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is run.

    Parameters
    ----------
    share
        Part of the devices that is hostile.
    alpha
        Of the Dirichlet shares of the classes; None: all devices have the same.
    codec
        What gradients travel in.
    seed
        Seed of the run, of its task, and of who is hostile.
    num_devices, rounds, batch_size, lr
        As in any run; the rate falls to nothing, lest accuracy go up and down.
    own_examples
        Examples that the server has to judge devices by; as many as the apps have.
    """

    share: float = 0.0
    alpha: float | None = None
    codec: str = "fp32"
    seed: int = 0
    num_devices: int = 12
    rounds: int = 120
    batch_size: int = 16
    lr: float = 1e-2
    own_examples: int = 64

    @property
    def hostile(self) -> frozenset[int]:
        """Numbers of the hostile devices."""
        drawn = rng_for(self.seed, "hostile").permutation(self.num_devices)
        return frozenset(drawn[: round(self.share * self.num_devices)].tolist())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run.

    Parameters
    ----------
    accuracy
        On data that no device has: the mean over evaluations in the last rounds, since
        steps are large and accuracy goes up and down.
    backdoor
        Part of the examples of the other class that the trigger turns, likewise.
    honest_refused
        Updates of honest devices that were not used, as a part of all of theirs.
    honest_distrusted
        Honest devices that were trusted less than half in the end.
    found
        Hostile devices that were refused in the end, or trusted less than half, as a
        part of them.
    found_after
        Rounds until the median one of those was for the first time; None of none.
    """

    accuracy: float
    backdoor: float
    honest_refused: float
    honest_distrusted: int
    found: float
    found_after: int | None


class _Devices:
    """The devices of a run, of which some answer as an attack has it."""

    def __init__(
        self,
        scenario: Scenario,
        attack: Attack,
        task: SmallTask,
        local: tuple[nn.Module, BlockPartition],
        store: Path,
    ) -> None:
        self._attack, self._partition = attack, local[1]
        self._hostile, self._store = scenario.hostile, store
        self._gang = Gang(scenario.seed, self._partition)
        self._asked: dict[int, int] = {}
        self._devices = [
            self._device(scenario, task, local, index)
            for index in range(scenario.num_devices)
        ]

    def _device(
        self,
        scenario: Scenario,
        task: SmallTask,
        local: tuple[nn.Module, BlockPartition],
        index: int,
    ) -> BlockDevice:
        changed = self._attack if index in self._hostile else Attack(name=HONEST)

        def draw(server_round: int, batch_size: int) -> Batch:
            return changed.batch(task.draw(index, server_round, batch_size))

        return BlockDevice(
            profile=changed.profile(simulated_device(index, seed=scenario.seed)),
            load_model=lambda: local,
            batch_source=draw,
            store=self._store,
            seed=scenario.seed,
            simulated_compute_s=lambda assignment: 1e-3,
        )

    def there(self, server_round: int) -> list[int]:
        """Return the numbers of those that are there in a round."""
        late = self._attack.joins_at_round > server_round
        return [
            index
            for index in range(len(self._devices))
            if not (late and index in self._hostile)
        ]

    def meet(self, coordinator: Coordinator, server_round: int) -> dict[str, int]:
        """Have the coordinator know who is there; return their numbers by id."""
        ids = {f"id-{index}": index for index in self.there(server_round)}
        for device in coordinator.meet_devices(server_round, ids):
            profile = self._devices[ids[device]].profile
            coordinator.add_device(device, profile.to_properties())
        return ids

    def name(self, index: int) -> str:
        """Return the name of a device, which records have."""
        return self._devices[index].profile.name

    def reply(
        self, index: int, assignment: Assignment, values: Float32Arrays
    ) -> DeviceReply:
        """Return what a device sends back."""
        update = self._devices[index].train(assignment, values)
        tensors = {name: npy(array) for name, array in update.arrays.items()}
        reply = DeviceReply(
            f"id-{index}", tensors, update.num_examples, update.report.to_record()
        )
        if index not in self._hostile:
            return reply
        times = self._asked.get(index, 0)
        self._asked[index] = times + 1
        turn = Turn(
            device=index, times_asked=times, assignment=assignment, gang=self._gang
        )
        codec = codec_named(assignment.codec)
        names = self._partition.update_names(
            *assignment.blocks, head=assignment.sends_head
        )
        shapes = {name: values[name].shape for name in names}
        wire = unpack(update.arrays[GRADIENTS], codec, shapes)
        honest = {n: codec.decode(array, shapes[n]) for n, array in wire.items()}
        self._gang.computed(assignment.block_index, honest)
        sent = self._attack.gradients(honest, turn)
        if sent is not honest:
            with TemporaryDirectory() as nowhere:
                residuals = Residuals(Path(nowhere), "hostile")
                encoded = encode_update(sent, self._partition, assignment, residuals)
            reply = replace(reply, tensors={GRADIENTS: npy(encoded)})
        return self._attack.reply(reply, turn)

    def see(self, values: Float32Arrays) -> None:
        """Let the hostile devices have the model as it is sent."""
        self._gang.saw(values)


def run(
    scenario: Scenario, attack: Attack, limits: NormLimits | None = None
) -> Outcome:
    """Run a scenario's rounds, and say what came of it.

    Parameters
    ----------
    scenario
        What is run.
    attack
        What hostile devices do.
    limits
        The server's (default: those that it has).
    """
    task = SmallTask.split(
        scenario.num_devices, alpha=scenario.alpha, seed=scenario.seed
    )
    model, partition = small_model(scenario.seed)
    coordinator = _coordinator(scenario, task, (model, partition), limits)
    records, accuracies, backdoors = [], [], []
    distrusted: list[set[str]] = []
    with TemporaryDirectory() as store:
        devices = _Devices(scenario, attack, task, (model, partition), Path(store))
        for server_round in range(1, scenario.rounds + 1):
            ids = devices.meet(coordinator, server_round)
            plan = coordinator.plan_round(server_round, ids)
            values = coordinator.values()
            devices.see(values)
            replies = [
                devices.reply(ids[device], assignment, values)
                for device, assignment in plan.assignments.items()
            ]
            records.append(coordinator.complete_round(plan, replies))
            distrusted.append(_distrusted(coordinator.state))
            left = scenario.rounds - server_round
            if left % _EVERY == 0 and left < _EVERY * _EVALUATIONS:
                state, names = coordinator.values(), partition.trainable
                load_values(model, names, [state[name] for name in names])
                accuracies.append(task.accuracy(model))
                backdoors.append(task.backdoor_success(model))
    hostile = {devices.name(index) for index in scenario.hostile}
    return _outcome(accuracies, backdoors, records, distrusted, hostile)


def _coordinator(
    scenario: Scenario,
    task: SmallTask,
    trained: tuple[nn.Module, BlockPartition],
    limits: NormLimits | None,
) -> Coordinator:
    own_examples = None
    if scenario.own_examples:
        examples = task.own_examples(scenario.own_examples)
        own_examples = example_gradients(
            *small_model(scenario.seed),
            lambda chosen: {name: values[chosen] for name, values in examples.items()},
            scenario.own_examples,
        )
    model, partition = trained
    return coordinator_for(
        model,
        partition,
        costs=_costs(scenario.batch_size),
        batch_size=scenario.batch_size,
        step=ServerStep(lr=scenario.lr, linear_decay_steps=scenario.rounds),
        settings=RoundSettings(
            channel=Channel(bandwidth_hz=1e6),
            transfer=Transfer(codec=scenario.codec),
            allocation=AllocationOptions(rotation_eps=0.5),
            limits=NormLimits() if limits is None else limits,
            devices=DeviceOptions(own_examples=own_examples),
            seed=scenario.seed,
        ),
    )


@lru_cache
def _costs(batch_size: int) -> BlockCosts:
    """Return what the model's blocks cost, whatever its values."""
    return model_costs(*small_model(0), batch_size=batch_size, sequence_length=LENGTH)


def _outcome(
    accuracies: list[float],
    backdoors: list[float],
    records: list[RoundRecord],
    distrusted: list[set[str]],
    hostile: set[str],
) -> Outcome:
    blocks = [block for record in records for block in record.blocks]
    honest = [block for block in blocks if block.device not in hostile]
    refused = [block for block in honest if block.status != "accepted"]
    found = hostile & distrusted[-1]
    first = [
        next(n for n, names in enumerate(distrusted, 1) if device in names)
        for device in found
    ]
    return Outcome(
        accuracy=float(np.mean(accuracies)),
        backdoor=_mean_of_known(backdoors),
        honest_refused=len(refused) / len(honest),
        honest_distrusted=len(distrusted[-1] - hostile),
        found=len(found) / len(hostile) if hostile else 0.0,
        found_after=int(np.median(first)) if first else None,
    )


def _mean_of_known(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _distrusted(state: RunState) -> set[str]:
    """Return the names of those trusted less than half, or that failed lately."""
    trust, failures = state.reputation.trust, state.fleet.absences.failures
    names = [profile.name for profile in state.fleet.profiles.values()]
    return {name for name in names if trust(name) < 0.5 or failures(name)}
