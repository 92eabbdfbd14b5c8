"""A run in which some devices are hostile; the server and the devices are real ones.

The server is the `Coordinator` with all that a run's state is, the devices are
`BlockDevice`s; neither Flower nor a network is between them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

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
from lola_flwr.run.records import RoundRecord
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.replies import DeviceReply
from lola_flwr.server.state import RunState
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.packing import GRADIENTS, unpack
from lola_flwr.wire.records import Assignment
from simulations.attacks.attack import HONEST, Attack, Gang, Turn, npy
from simulations.attacks.scenario import Outcome, Scenario
from simulations.attacks.task import AttackedTask, TaskModel


class _Devices:
    """The devices of a run, of which some answer as an attack has it."""

    def __init__(
        self,
        scenario: Scenario,
        attack: Attack,
        task: AttackedTask,
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
        task: AttackedTask,
        local: tuple[nn.Module, BlockPartition],
        index: int,
    ) -> BlockDevice:
        changed = self._attack if index in self._hostile else Attack(name=HONEST)

        def draw(server_round: int, batch_size: int) -> Batch:
            return changed.batch(task.draw(index, server_round, batch_size), task)

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
    task = scenario.task_model.split(
        scenario.num_devices, alpha=scenario.alpha, seed=scenario.seed
    )
    model, partition = scenario.task_model.load(scenario.seed)
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
            if scenario.is_evaluated(server_round):
                state, names = coordinator.values(), partition.trainable
                load_values(model, names, [state[name] for name in names])
                accuracies.append(task.accuracy(model))
                backdoors.append(task.backdoor_success(model))
    hostile = {devices.name(index) for index in scenario.hostile}
    return Outcome.of(
        accuracies=accuracies,
        backdoors=backdoors,
        honest_refused=_honest_refused(records, hostile),
        distrusted=distrusted,
        hostile=hostile,
    )


def _coordinator(
    scenario: Scenario,
    task: AttackedTask,
    trained: tuple[nn.Module, BlockPartition],
    limits: NormLimits | None,
) -> Coordinator:
    own_examples = None
    if scenario.own_examples:
        examples = task.own_examples(scenario.own_examples)
        own_examples = example_gradients(
            *scenario.task_model.load(scenario.seed),
            lambda chosen: {name: values[chosen] for name, values in examples.items()},
            scenario.own_examples,
        )
    model, partition = trained
    return coordinator_for(
        model,
        partition,
        costs=_costs(scenario.task_model, scenario.batch_size, task.max_tokens),
        batch_size=scenario.batch_size,
        step=ServerStep(lr=scenario.lr, linear_decay_steps=scenario.rounds),
        settings=RoundSettings(
            channel=Channel(bandwidth_hz=scenario.task_model.recipe.bandwidth_hz),
            transfer=Transfer(codec=scenario.codec),
            allocation=AllocationOptions(rotation_eps=0.5),
            limits=NormLimits() if limits is None else limits,
            devices=DeviceOptions(own_examples=own_examples),
            seed=scenario.seed,
        ),
    )


@lru_cache
def _costs(task_model: TaskModel, batch_size: int, max_tokens: int) -> BlockCosts:
    """Return what the model's blocks cost, whatever its values."""
    return model_costs(
        *task_model.load(0), batch_size=batch_size, sequence_length=max_tokens
    )


def _honest_refused(records: list[RoundRecord], hostile: set[str]) -> float:
    """Return the part of honest devices' updates that was not used."""
    blocks = [block for record in records for block in record.blocks]
    honest = [block for block in blocks if block.device not in hostile]
    refused = [block for block in honest if block.status != "accepted"]
    return len(refused) / len(honest)


def _distrusted(state: RunState) -> set[str]:
    """Return the names of those that count half or less, or that failed lately.

    Newcomers count less, too, but are no less trusted.
    """
    reputation, failures = state.reputation, state.fleet.absences.failures
    names = [profile.name for profile in state.fleet.profiles.values()]
    counts = {n: reputation.trust(n) * reputation.likeness.voice(n) for n in names}
    return {name for name in names if counts[name] <= 0.5 or failures(name)}
