"""The server's own head says what labels make of a micro-batch, where it can."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lola_flwr.build import MicroBatches, ServerStep, trainer_for
from lola_flwr.clients import BlockDevice
from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.run.checkpoint import Checkpoints
from lola_flwr.server.spread.exchange import PartReply
from lola_flwr.system.devices import simulated_device
from simulations.attacks.small import SmallTask, small_model
from tests.marks import rest_slow
from tests.server.coordinators import npy

DEVICES = [f"id-{number}" for number in range(6)]


def class_weighted(model, batch):
    logits = model(**{**batch, "labels": None}).logits
    return cross_entropy(logits, batch["labels"], torch.tensor([1.0, 4.0]))


def smoothed(model, batch):
    logits = model(**{**batch, "labels": None}).logits
    return cross_entropy(logits, batch["labels"], label_smoothing=0.3)


class Federation:
    """Six devices that own a micro-batch in each step, of which the first may lie."""

    def __init__(self, *, head_dropout=0.0, num_labels=2, share=0.5, **options):
        model = small_model(0, head_dropout=head_dropout)[0]
        if num_labels != 2:
            torch.manual_seed(0)
            model.config.num_labels = num_labels
            model = type(model)(model.config)
        self.model, self.partition = model, model_partition(model)
        self.num_labels = num_labels
        self.task = SmallTask.split(6, alpha=None, seed=0)
        self.devices = {
            device: BlockDevice(
                profile=simulated_device(number, seed=0),
                load_model=self._loader(),
                batch_source=self._source(number),
                **options,
            )
            for number, device in enumerate(DEVICES)
        }
        self.liars = {}
        self.trainer = self.new_trainer(share)

    def _loader(self):
        loaded = copy.deepcopy(self.model), self.partition
        return lambda: loaded

    def _source(self, number):
        def draw(micro_batch, batch_size):
            batch = self.task.draw(number, micro_batch, batch_size)
            if self.num_labels == 1:
                batch["labels"] = batch["labels"].float()
            return batch

        return draw

    def new_trainer(self, share=0.5):
        trainer = trainer_for(
            copy.deepcopy(self.model),
            self.partition,
            schedules=StepSchedules(micro_batches=6, audit_share=share, audit_seed=0),
            micro_batches=MicroBatches(micro_batch_size=16),
            step=ServerStep(lr=1e-3),
        )
        self.meet(trainer)
        return trainer

    def meet(self, trainer):
        for device in trainer.meet_devices(1, DEVICES):
            profile = self.devices[device].profile
            trainer.add_device(device, profile.to_properties())

    def exchange(self, requests):
        return {device: self._reply(device, one) for device, one in requests.items()}

    def _reply(self, device, request):
        sent = {name: array.copy() for name, array in request.arrays.items()}
        report, arrays = self.devices[device].compute_part(request.task, sent)
        if request.task.kind == "loss" and device in self.liars:
            arrays = self.liars[device](arrays)
        return PartReply({n: npy(a) for n, a in arrays.items()}, report.to_record())

    def take(self, steps, trainer=None):
        trainer = trainer or self.trainer
        first = trainer.server_round + 1
        return [
            trainer.complete_round(trainer.plan_round(step, DEVICES), self.exchange)
            for step in range(first, first + steps)
        ]

    @property
    def shown(self):
        return self.trainer.state.shown


def changed(slopes=1.0, gradients=1.0):
    factors = {"slopes": slopes, "gradients": gradients}
    return lambda arrays: {n: np.float32(factors[n]) * a for n, a in arrays.items()}


HONEST = {
    "cross-entropy": ({}, True),
    "bfloat16": ({"precision": "bf16"}, True),
    "class weights": ({"loss_function": class_weighted}, False),
    "label smoothing": ({"loss_function": smoothed}, False),
    "regression": ({"num_labels": 1}, None),
    "dropout in the head": ({"head_dropout": 0.1}, None),
    "no audits": ({"share": 0.0}, None),
}


@pytest.mark.parametrize("name", rest_slow(HONEST, 2))
def test_no_honest_owner_is_accused(name):
    options, is_shown = HONEST[name]
    honest = Federation(**options)
    records = honest.take(3)
    assert [record.skipped for record in records] == [None] * 3
    assert honest.trainer.state.excluded is None
    if is_shown is None:
        assert honest.shown is None, "the check is off"
    elif is_shown:
        assert sum(honest.shown.values()) >= 4
    else:
        assert not any(honest.shown.values())


@pytest.mark.parametrize(
    "factors",
    rest_slow(
        [
            {"slopes": -1.0},
            {"slopes": 3.0},
            {"slopes": -2.9, "gradients": -2.9},
            {"gradients": -9.9},
        ],
        1,
    ),
)
def test_two_liars_of_six_are_found(factors):
    hostile = Federation()
    hostile.take(10)
    hostile.liars = dict.fromkeys(DEVICES[:2], changed(**factors))
    for _ in range(30):
        (record,) = hostile.take(1)
        if record.skipped:
            break
    assert record.skipped is not None
    assert "labels away from what any labels make of it" in record.skipped
    assert "\n" not in record.skipped
    names = {hostile.devices[d].profile.name for d in DEVICES[:2]}
    assert set(hostile.trainer.state.excluded) <= names


@pytest.mark.slow
def test_four_of_six_accuse_nobody():
    hostile = Federation()
    hostile.liars = dict.fromkeys(DEVICES[:4], changed(slopes=-2.9))
    records = hostile.take(3)
    assert [record.skipped for record in records] == [None] * 3


@pytest.mark.slow
def test_who_is_near_labels_is_not_scaled_down():
    """However unusual its length: so honest runs lose nothing."""
    honest = Federation()
    honest.take(2)
    norms = honest.trainer.state.norms
    tiny = dict.fromkeys(norms.of_block, (1e-09,) * 20)
    history = replace(norms, of_block=tiny, devices={})
    scaled = []
    for norms in (history, honest.trainer.state.norms):
        fresh = honest.new_trainer()
        fresh.state = replace(fresh.state, norms=norms)
        honest.take(1, fresh)
        scaled.append(fresh.values()["classifier.out_proj.weight"].copy())
    np.testing.assert_array_equal(*scaled)


def test_the_model_s_configuration_is_as_before():
    """Which transformers changes as it guesses what labels are."""
    honest = Federation()
    honest.take(1)
    assert honest.trainer._model.config.problem_type is None


def test_a_checkpoint_keeps_whose_losses_are_known(tmp_path):
    honest = Federation()
    honest.take(2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, honest.trainer.snapshot())
    saved = checkpoints.latest()[0]
    second = honest.new_trainer()
    second.restore(saved)
    assert second.state.shown == honest.shown
    # As an earlier version saved it.
    del saved.values["state"]["shown"]
    third = honest.new_trainer()
    third.restore(saved)
    assert third.state.shown is None
