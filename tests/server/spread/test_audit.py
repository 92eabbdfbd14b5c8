"""Spot checks: who lies about a part is found, and who does not is never accused."""

from __future__ import annotations

import copy
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch

from lola_flwr.build import MicroBatches, NormLimits, ServerStep, trainer_for
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.device import keeping
from lola_flwr.device.part import compute_part
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import model_loss
from lola_flwr.run.checkpoint import Checkpoints
from lola_flwr.server.spread import audit
from lola_flwr.server.spread.exchange import PartReply
from simulations.attacks.attack import HONEST, Attack, PartTurn
from simulations.attacks.parts import PART_ATTACKS
from tests.d2ft.cases import FAMILIES, make
from tests.marks import rest_slow
from tests.server.coordinators import npy
from tests.server.spread.test_holding import (
    DEVICES,
    MAX_NORM,
    STEP,
    Devices,
    assert_same,
    drawn,
    meet,
    plans,
    take,
    values_of,
    without_dropout,
)

ATTACKS = {attack.name: attack for attack in PART_ATTACKS}
# What audits add to a record: messages, and the time that they take.
TRAFFIC = ("exchanges", "sent_bytes", "received_bytes")
APART = (*TRAFFIC, "wireless_s", "round_s", "observed_s")


def federation(family="roberta", *, share=1.0, dropout=True):
    case = make(family) if dropout else without_dropout(make(family))
    trainer = trainer_for(
        copy.deepcopy(case.model),
        case.partition,
        schedules=StepSchedules(micro_batches=3, audit_share=share, audit_seed=0),
        micro_batches=MicroBatches(micro_batch_size=2, example_weight=10),
        step=ServerStep(**STEP),
        limits=NormLimits(MAX_NORM),
    )
    meet(trainer)
    return case, trainer


class Federation(Devices):
    """Devices of which "b" answers as an attack has it, by dice of its own."""

    def __init__(self, case, attack=None, *, dice=0, autocast=False):
        super().__init__(case)
        self.attack = attack or Attack(name=HONEST)
        self.dice, self.autocast = dice, autocast
        for model in self.models.values():
            model.train()

    def reply(self, device, request):
        if device != "b":
            return super().reply(device, request)
        self.before(device, request.task)
        task = replace(request.task, seed=request.task.seed + self.dice)
        turn = PartTurn(device=device, task=task, seed=0)
        arrays = {name: array.copy() for name, array in request.arrays.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            result = compute_part(
                self.models[device],
                self.case.partition,
                task,
                self.attack.received(arrays, turn),
                draw=lambda number, _: drawn(self.case, number),
                loss_function=model_loss,
                batch_weight=self.case.batch_weight,
            )
        report, arrays = self.attack.part(result, turn)
        reply = PartReply(
            {name: npy(array) for name, array in arrays.items()}, report.to_record()
        )
        return self.alter(device, task, reply)

    def drawn(self, number, _):
        first = (number * 2) % 6
        return {
            name: tensor[first : first + 2] for name, tensor in self.case.batch.items()
        }


def until_excluded(trainer, devices, steps):
    """Steps until somebody is excluded; the last one's record."""
    for plan in steps:
        full = np.full_like(plan.operations, Operation.FULL)
        record = trainer.complete_round(replace(plan, operations=full), devices)
        if trainer.state.excluded:
            return record
        assert record.skipped is None
    return None


@pytest.mark.parametrize("family", rest_slow(FAMILIES, 2))
def test_honest_devices_are_never_accused(family):
    """With dropout, under random schedules, as sub-networks move."""
    case, trainer = federation(family)
    devices = Federation(case)
    records = take(trainer, devices, range(1, 9))
    assert [record.skipped for record in records] == [None] * 8
    trainer.values()
    assert trainer.state.excluded is None
    assert not trainer.state.fleet.absences.of_device
    audited = {one.task.step for _, one in devices.asked("return")}
    assert len(audited) > 4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [{"dice": 77}, {"autocast": True}])
def test_nor_are_those_of_other_hardware(family, how):
    """Which draws other numbers for dropout, or computes in bfloat16."""
    case, trainer = federation(family, dropout="dice" in how)
    records = take(trainer, Federation(case, **how), range(1, 13), moving=False)
    assert [record.skipped for record in records] == [None] * 12
    trainer.values()
    assert not trainer.state.fleet.absences.of_device


@pytest.mark.parametrize("family", rest_slow(["roberta", "roberta-lora"]))
def test_audits_change_nothing_but_traffic(family):
    values, both = [], []
    for share in (0.0, 1.0):
        case, trainer = federation(family, share=share)
        both.append(take(trainer, Federation(case), range(1, 6)))
        values.append(values_of(trainer))
    assert_same(*values)
    without, audited = both
    for name in TRAFFIC:
        more = sum(getattr(record, name) for record in audited)
        more -= sum(getattr(record, name) for record in without)
        assert (more > 0) == (name != "sent_bytes"), "what is asked for has no arrays"
    alike = [[replace(r, **dict.fromkeys(APART, 0)) for r in each] for each in both]
    assert alike[0] == alike[1]


LIES = {
    "contributions turned round": "contributions to",
    "contributions, 9.9 times": "contributions to",
    "contributions of noise, 9 times": "contributions to",
    "hidden states' gradients turned round": "gradients of the hidden states of",
    "hidden states' gradients turned round, 9.9 times": "gradients of the hidden",
    "all gradients turned round, 9.9 times": "gradients of the hidden states of",
    "returned values turned round": "values, after a step of its own, of",
    "returned values far off": "contributions to",
    "sub-networks trained the wrong way": "values, after a step of its own, of",
    "claims a huge gradient": "lengths of gradients of",
    # With the values that it returns contributions are nothing.
    "parts of zeros": "lengths of gradients of",
}


@pytest.mark.parametrize("name", rest_slow(LIES, 2))
def test_who_lies_is_found_and_takes_part_no_more(name):
    case, trainer = federation(dropout=False)
    devices = Federation(case, ATTACKS[name])
    steps = plans(trainer, range(1, 41), moving=False)
    record = until_excluded(trainer, devices, steps)
    assert trainer.state.excluded == ("b",)
    assert record.skipped.startswith(f"device b: its {LIES[name]}")
    assert "of layer 1 (" in record.skipped or "to layer 1 (" in record.skipped
    assert "\n" not in record.skipped
    later = range(record.server_round + 1, record.server_round + 40)
    for step in later:
        assert trainer.plan_round(step, DEVICES).device_ids == ("a", "c")
    (after,) = take(trainer, devices, later[:1], moving=False)
    assert after.skipped is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["contributions turned round", "hidden states' gradients turned round"]
)
def test_dropout_hides_no_lie_that_is_larger_than_it(name):
    case, trainer = federation()
    devices = Federation(case, ATTACKS[name], dice=77)
    until_excluded(trainer, devices, plans(trainer, range(1, 41), moving=False))
    assert trainer.state.excluded == ("b",)


def test_a_device_is_asked_for_values_when_its_answers_are_there():
    case, trainer = federation()
    devices = Federation(case)
    take(trainer, devices, range(1, 9), moving=False)
    kinds = {step: [] for step in range(1, 9)}
    for _, one in devices.requests:
        kinds[one.task.step].append(one.task.kind)
    audited = [mine for mine in kinds.values() if "return" in mine]
    assert audited
    for mine in audited:
        first = mine.index("return")
        assert {*mine[first:]} == {"return"}
        assert {"forward", "backward"} <= {*mine[:first]}


def test_who_is_audited_follows_from_a_seed_that_is_nobody_s():
    draws = []
    for seed in (None, None, 5, 5):
        schedules = StepSchedules(audit_share=0.5, audit_seed=seed)
        auditor = audit.Auditor(lambda task, arrays: None, schedules)
        places = {str(number): DEVICES[number % 3] for number in range(12)}
        draws.append([])
        for step in range(200):
            auditor.watch(step, places)
            draws[-1].append([*auditor._watched])
    assert draws[0] != draws[1]
    assert draws[2] == draws[3]
    counts = [len(watched) for watched in draws[2]]
    assert {*counts} == {0, 1}
    assert 70 < sum(counts) < 130
    assert {place for watched in draws[2] for place in watched} == {*places}


def returning_longer(result, turn):
    report, arrays = result
    if turn.task.kind != "return":
        return result
    return report, {**arrays, "values": arrays["values"] * np.float32(1.3)}


@pytest.mark.slow
def test_what_a_liar_returned_before_is_not_kept():
    case, trainer = federation(dropout=False)
    devices = Federation(case, Attack(name="longer", part=returning_longer))
    take(trainer, devices, [1], moving=False)
    name = "roberta.encoder.layer.1.output.dense.weight"
    before = trainer._held.known()[name].copy()
    assert abs(trainer.values()[name] / before - 1).mean() > 0.2
    until_excluded(trainer, devices, plans(trainer, range(2, 41), moving=False))
    assert trainer.state.excluded == ("b",)
    np.testing.assert_array_equal(trainer._held.known()[name], before)


@pytest.mark.parametrize("dropout", rest_slow([True, False]))
def test_values_that_ruin_a_model_are_not_taken_in(dropout):
    """Whatever they are returned for, and though nobody audits."""
    case, trainer = federation(share=1e-9, dropout=dropout)
    devices = Federation(case, ATTACKS["returned values far off"])
    take(trainer, devices, [1], moving=False)
    layer = "roberta.encoder.layer.1.output.dense.weight"
    before = trainer._held.known()[layer].copy()
    np.testing.assert_array_equal(trainer.values()[layer], before)
    assert trainer.plan_round(2, DEVICES).device_ids == ("a", "c"), "it rests"
    assert trainer.state.excluded is None


def test_who_does_not_say_what_it_computed_with_costs_the_step_and_rests():
    case, trainer = federation()
    devices = Federation(case)

    def lack(device, task, reply):
        if (device, task.kind) != ("b", "return"):
            return reply
        return PartReply({}, {**reply.report, "lacks": "values"})

    devices.alter = lack
    for plan in plans(trainer, range(1, 21), moving=False):
        record = trainer.complete_round(plan, devices)
        if record.skipped:
            break
    assert record.skipped.startswith("device b: it does not have the 'values' that it")
    assert trainer.plan_round(plan.step + 1, DEVICES).device_ids == ("a", "c")
    assert trainer.state.excluded is None


@pytest.mark.slow
def test_a_checkpoint_keeps_who_lied(tmp_path):
    case, first = federation(dropout=False)
    devices = Federation(case, ATTACKS["contributions turned round"])
    until_excluded(first, devices, plans(first, range(1, 41), moving=False))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(first.server_round, first.snapshot())
    saved = checkpoints.latest()[0]
    _, second = federation(dropout=False)
    second.restore(saved)
    meet(second)
    assert second.plan_round(50, DEVICES).device_ids == ("a", "c")
    with pytest.raises(UserError, match=r"usable profile\. Found to lie: b\."):
        second.plan_round(50, ["b"])
    # As an earlier version saved it.
    del saved.values["state"]["excluded"]
    _, third = federation(dropout=False)
    third.restore(saved)
    meet(third)
    assert third.state.excluded is None
    assert "b" in third.plan_round(90, DEVICES).device_ids


@pytest.mark.slow
def test_the_server_keeps_no_more_than_two_places_need(monkeypatch):
    """That of the step before, whose step is checked, and that of this one."""
    monkeypatch.setattr(keeping, "_memories", WeakKeyDictionary())
    case, trainer = federation()
    devices = Federation(case)
    take(trainer, devices, range(1, 11), moving=False)
    models = {id(model) for model in devices.models.values()}
    (own,) = (m for model, m in keeping._memories.items() if id(model) not in models)
    places = {name.rpartition("-")[0] for name in own.kept}
    assert 1 <= len(places) <= 2


@pytest.mark.parametrize(
    "wrong", [{"audit_share": 1.1}, {"audit_share": -0.1}, {"audit_seed": -1}]
)
def test_wrong_options_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        StepSchedules(**wrong)
