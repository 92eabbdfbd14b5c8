"""A run of D2FT in which some devices are hostile; server and devices are real ones.

The server is the `SpreadTrainer`, the devices are `BlockDevice`s; neither Flower nor a
network is between them.
"""

from __future__ import annotations

from collections.abc import Mapping

from lola_flwr.build import Channel, MicroBatches, ServerStep, trainer_for
from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.model.backprop import Batch
from lola_flwr.model.loading import load_values
from lola_flwr.server.spread.exchange import PartReply, PartRequest
from lola_flwr.server.spread.trainer import SpreadTrainer
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.records import PartTask
from simulations.attacks.attack import HONEST, Attack, PartTurn, npy
from simulations.attacks.scenario import Outcome, Scenario
from simulations.attacks.task import AttackedTask


class _Devices:
    """The devices of a run, of which some answer as an attack has it.

    Each has a model of its own, as where it is a machine of its own.
    """

    def __init__(self, scenario: Scenario, attack: Attack, task: AttackedTask) -> None:
        self._scenario, self._late = scenario, attack.joins_at_round
        honest = Attack(name=HONEST)
        self._attacks = {
            f"id-{index}": attack if index in scenario.hostile else honest
            for index in range(scenario.num_devices)
        }
        self._hostile = {f"id-{index}" for index in scenario.hostile}
        self._devices = {
            device: self._device(index, changed, task)
            for index, (device, changed) in enumerate(self._attacks.items())
        }

    def _device(self, index: int, changed: Attack, task: AttackedTask) -> BlockDevice:
        seed = self._scenario.seed
        local = self._scenario.task_model.load(seed)

        def draw(number: int, batch_size: int) -> Batch:
            return changed.batch(task.draw(index, number, batch_size), task)

        return BlockDevice(
            profile=changed.profile(simulated_device(index, seed=seed)),
            load_model=lambda: local,
            batch_source=draw,
            seed=seed,
        )

    @property
    def names(self) -> dict[str, str]:
        """Names of the devices, which records have, by id."""
        return {device: d.profile.name for device, d in self._devices.items()}

    @property
    def hostile(self) -> set[str]:
        """Names of the hostile devices."""
        return {self.names[device] for device in self._hostile}

    def meet(self, trainer: SpreadTrainer, step: int) -> list[str]:
        """Have the trainer know who is there; return their ids."""
        late = self._late > step
        ids = [d for d in self._devices if not (late and d in self._hostile)]
        for device in trainer.meet_devices(step, ids):
            profile = self._devices[device].profile
            trainer.add_device(device, profile.to_properties())
        return ids

    def exchange(self, requests: Mapping[str, PartRequest]) -> dict[str, PartReply]:
        """Return what devices send back, by id."""
        return {device: self._reply(device, one) for device, one in requests.items()}

    def _reply(self, device: str, request: PartRequest) -> PartReply:
        task = PartTask.from_record(request.task.to_record())
        sent = {name: array.copy() for name, array in request.arrays.items()}
        attack = self._attacks[device]
        turn = PartTurn(device=device, task=task, seed=self._scenario.seed)
        result = self._devices[device].compute_part(task, attack.received(sent, turn))
        report, arrays = attack.part(result, turn)
        return PartReply(
            {name: npy(array) for name, array in arrays.items()}, report.to_record()
        )


def run(scenario: Scenario, attack: Attack) -> Outcome:
    """Run a scenario's steps, and say what came of it.

    A step's examples are as many as those of a round of LoLa-DEFT: a mini-batch for
    each block.

    Parameters
    ----------
    scenario
        What is run.
    attack
        What hostile devices do.
    """
    task = scenario.task_model.split(
        scenario.num_devices, alpha=scenario.alpha, seed=scenario.seed
    )
    devices = _Devices(scenario, attack, task)
    trainer = _trainer(scenario, task)
    judged, partition = scenario.task_model.load(scenario.seed)
    accuracies, backdoors = [], []
    distrusted: list[set[str]] = []
    parts = lost = 0
    for step in range(1, scenario.rounds + 1):
        plan = trainer.plan_round(step, devices.meet(trainer, step))
        before = _failures(trainer)
        record = trainer.complete_round(plan, devices.exchange)
        after = _failures(trainer)
        honest = {devices.names[d] for d in plan.device_ids} - devices.hostile
        parts += len(honest)
        lost += sum(
            record.skipped is not None or after[name] > before[name] for name in honest
        )
        if scenario.is_evaluated(step):
            values, names = trainer.values(), partition.trainable
            load_values(judged, names, [values[name] for name in names])
            accuracies.append(task.accuracy(judged))
            backdoors.append(task.backdoor_success(judged))
        # Who returns what cannot be is refused when it is asked for values, too.
        failures = _failures(trainer)
        distrusted.append({name for name, failed in failures.items() if failed})
    return Outcome.of(
        accuracies=accuracies,
        backdoors=backdoors,
        honest_refused=lost / parts,
        distrusted=distrusted,
        hostile=devices.hostile,
    )


def _trainer(scenario: Scenario, task: AttackedTask) -> SpreadTrainer:
    model, partition = scenario.task_model.load(scenario.seed)
    return trainer_for(
        model,
        partition,
        schedules=StepSchedules(
            micro_batches=partition.num_blocks,
            seed=scenario.seed,
            audit_seed=scenario.seed,
        ),
        micro_batches=MicroBatches(
            micro_batch_size=scenario.batch_size, max_tokens=task.max_tokens
        ),
        step=ServerStep(lr=scenario.lr, linear_decay_steps=scenario.rounds),
        channel=Channel(bandwidth_hz=scenario.task_model.recipe.bandwidth_hz),
        seed=scenario.seed,
    )


def _failures(trainer: SpreadTrainer) -> dict[str, int]:
    """Return how often each device failed lately, by its name."""
    fleet = trainer.state.fleet
    names = [profile.name for profile in fleet.profiles.values()]
    return {name: fleet.absences.failures(name) for name in names}
