"""Devices that hold their sub-networks step them as one process would."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lola_flwr.build import MicroBatches, NormLimits, ServerStep, trainer_for
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import place_subnetworks
from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.d2ft.training import scheduled_gradient
from lola_flwr.device import holder
from lola_flwr.device.keeping import Keeping
from lola_flwr.device.part import compute_part
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import model_loss
from lola_flwr.model.loading import load_values
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.run.checkpoint import Checkpoints
from lola_flwr.server.spread.exchange import PartFailed, PartReply
from lola_flwr.system.devices import DeviceProfile
from tests.d2ft.cases import make
from tests.marks import rest_slow
from tests.server.coordinators import npy
from tests.test_optimizer_snapshot import usable_optimizers

DEVICES = ["a", "b", "c"]
# Steps that are large, clipped now and then, and smaller each time.
STEP = {"lr": 1e-2, "linear_decay_steps": 9, "options": {"weight_decay": 0.3}}
MAX_NORM = 0.7


def drawn(case, number):
    first = (number * 2) % 6
    return {name: tensor[first : first + 2] for name, tensor in case.batch.items()}


class Devices:
    """Devices with models of their own; their processes end when they are restarted."""

    def __init__(self, case, store=None, memory_bytes=float("inf")):
        self.case, self.store, self.memory_bytes = case, store, memory_bytes
        self.models = {}
        for device in DEVICES:
            self.restart(device)
        self.requests = []
        # Told of each request before it is answered; what it raises is raised.
        self.before = lambda device, task: None
        self.alter = lambda device, task, reply: reply

    def restart(self, device):
        self.models[device] = copy.deepcopy(self.case.model)
        with torch.no_grad():
            for name, parameter in self.models[device].named_parameters():
                if name in self.case.trainable:
                    parameter.fill_(0.5)

    def __call__(self, requests):
        self.requests += requests.items()
        return {device: self.reply(device, one) for device, one in requests.items()}

    def reply(self, device, request):
        self.before(device, request.task)
        report, arrays = compute_part(
            self.models[device],
            self.case.partition,
            type(request.task).from_record(request.task.to_record()),
            {name: array.copy() for name, array in request.arrays.items()},
            draw=lambda number, _: drawn(self.case, number),
            loss_function=model_loss,
            batch_weight=self.case.batch_weight,
            keeping=Keeping(device, self.store, self.memory_bytes),
        )
        reply = PartReply(
            {name: npy(array) for name, array in arrays.items()}, report.to_record()
        )
        return self.alter(device, request.task, reply)

    def asked(self, kind):
        return [one for one in self.requests if one[1].task.kind == kind]


def without_dropout(case):
    for module in case.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return case


def federation(family="roberta", *, return_every=50, audit_share=0.0, **options):
    case = without_dropout(make(family))
    trainer = trainer_for(
        copy.deepcopy(case.model),
        case.partition,
        schedules=StepSchedules(
            micro_batches=3, return_every=return_every, audit_share=audit_share
        ),
        micro_batches=MicroBatches(micro_batch_size=2, example_weight=10),
        step=ServerStep(**(options or STEP)),
        # One process does not know whose a micro-batch is.
        limits=NormLimits(MAX_NORM, math.inf),
    )
    meet(trainer)
    return case, trainer


def meet(trainer):
    trainer.meet_devices(1, DEVICES)
    for device in DEVICES:
        profile = DeviceProfile(device, 1e9, 1e9, 10.0)
        trainer.add_device(device, profile.to_properties())


def plans(trainer, steps, *, moving=True):
    """Plans at random; sub-networks move, and some steps do without a device."""
    for step in steps:
        rng = np.random.default_rng(step)
        there = DEVICES[:2] if moving and step % 3 == 0 else DEVICES
        plan = trainer.plan_round(step, there)
        operations = rng.integers(0, 3, plan.operations.shape)
        operations[0] = Operation.FULL
        count = len(plan.device_ids)
        speeds = rng.integers(1, 4, count) if moving else [1] * count
        yield replace(
            plan,
            operations=operations,
            device_of=place_subnetworks(len(operations), speeds),
            present=frozenset(DEVICES),
        )


def take(trainer, devices, steps, **options):
    records = []
    for plan in plans(trainer, steps, **options):
        records.append(trainer.complete_round(plan, devices))
    return records


def in_one_process(case, plans, *, left_out=(), **options):
    """Losses and values of these steps."""
    step = ServerStep(**(options or STEP))
    model, names = copy.deepcopy(case.model).train(), case.trainable
    parameters = dict(model.named_parameters())
    optimizer = ServerOptimizer(
        {name: parameters[name].detach().numpy() for name in names}, **step.arguments()
    )
    subnetworks = find_subnetworks(model, case.partition)
    losses = []
    for plan in plans:
        if plan.step in left_out:
            continue
        load_values(model, names, [optimizer.state()[name] for name in names])
        numbers = [(plan.step - 1) * 3 + m + 1 for m in range(plan.operations.shape[1])]
        found = scheduled_gradient(
            model,
            subnetworks,
            names,
            [drawn(case, number) for number in numbers],
            plan.operations,
            batch_weight=case.batch_weight,
        )
        norm = torch.stack([g.norm() for g in found.gradients.values()]).norm()
        scale = min(1.0, MAX_NORM / float(norm))
        optimizer.step({n: (scale * g).numpy() for n, g in found.gradients.items()})
        losses.append(found.loss)
    return losses, optimizer


def assert_alike(found, expected, case, far=1e-3):
    """Compare moves; what has no gradient moves by its rounding's sign."""
    start = {n: p.detach().numpy() for n, p in case.model.named_parameters()}
    moved = {n: np.linalg.norm(values - start[n]) for n, values in expected.items()}
    for name, values in expected.items():
        if not name.endswith(("key.bias", "k_proj.bias", "Wqkv.bias")):
            error = np.linalg.norm(found[name] - values)
            assert error <= far * moved[name] + 1e-6, name


def assert_same(found, expected):
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def values_of(trainer):
    return {name: values.copy() for name, values in trainer.values().items()}


FAMILIES = ["roberta", "roberta-lora", "llama", "gpt2-lora", "vit", "modernbert"]


@pytest.mark.parametrize("family", rest_slow(FAMILIES))
def test_steps_are_those_of_one_process(family):
    case, trainer = federation(family)
    records = take(trainer, Devices(case), range(1, 5))
    assert [record.skipped for record in records] == [None] * 4
    losses, optimizer = in_one_process(case, plans(trainer, range(1, 5)))
    assert [r.train_loss for r in records] == pytest.approx(losses, rel=1e-4)
    assert_alike(trainer.values(), optimizer.state(), case)
    snapshot, expected = trainer.snapshot(), optimizer.snapshot()
    assert snapshot.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        if name.endswith("/step"):
            assert snapshot.arrays[name] == array == 4
    assert snapshot.values["optimizer"] == expected.values


@pytest.mark.slow
def test_what_nobody_was_sent_yet_is_stepped_too():
    """Weight decay, and moments, go on without a gradient."""
    case, trainer = federation()
    devices = Devices(case)

    def some(steps):
        for plan in plans(trainer, steps):
            if plan.step in (1, 2, 4):
                plan.operations[4:8] = Operation.SKIP  # all of layer 1
            yield plan

    for plan in some(range(1, 6)):
        trainer.complete_round(plan, devices)
    _, optimizer = in_one_process(case, some(range(1, 6)))
    assert_alike(trainer.values(), optimizer.state(), case)
    asked = {one.task.step for _, one in devices.requests if one.task.layer_index == 1}
    assert {1, 2, 4} & asked == {4}, "what it is about to hand over"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", usable_optimizers())
def test_optimizers_step_on_devices_as_in_one_process_or_are_refused(optimizer):
    step = {"optimizer": optimizer, "lr": 1e-2}
    try:
        case, trainer = federation(**step)
    except UserError as error:
        assert "steps matrices as a whole" in str(error)
        assert optimizer in ("Adafactor", "Muon")
        return
    take(trainer, Devices(case), range(1, 5))
    _, expected = in_one_process(case, plans(trainer, range(1, 5)), **step)
    # Whose first steps are the gradient's signs, and those of rounding.
    assert_alike(trainer.values(), expected.state(), case, far=0.05)


def test_values_are_sent_once_and_hidden_states_on_one_way():
    case, trainer = federation()
    devices = Devices(case)
    take(trainer, devices, range(1, 3), moving=False)
    sent = [
        (device, one.task.layer_index, one.task.branch_index)
        for device, one in devices.asked("forward")
        if "values" in one.arrays
    ]
    assert len(sent) == len(set(sent)) == 6
    assert not any("moments" in one.arrays for _, one in devices.requests)
    assert {name for _, one in devices.asked("backward") for name in one.arrays} == {
        "slopes"
    }
    assert not devices.asked("return")
    trainer.values()
    trainer.values()
    assert len(devices.asked("return")) == 6, "what is known is not asked for again"


@pytest.mark.slow
@pytest.mark.parametrize("memory_bytes", [float("inf"), 0.0])
def test_a_forward_pass_is_computed_anew_only_without_the_memory(
    memory_bytes, monkeypatch
):
    case, trainer = federation()
    computed = []
    whole = holder._contribution

    def counted(part, number, *rest):
        computed.append((part.task.kind, number))
        return whole(part, number, *rest)

    monkeypatch.setattr(holder, "_contribution", counted)
    take(trainer, Devices(case, memory_bytes=memory_bytes), range(1, 3))
    kinds = {kind for kind, _ in computed}
    assert kinds == ({"forward"} if memory_bytes else {"forward", "backward"})
    _, optimizer = in_one_process(case, plans(trainer, range(1, 3)))
    assert_alike(trainer.values(), optimizer.state(), case)


def without_restarts(**options):
    case, trainer = federation(**options)
    take(trainer, Devices(case), range(1, 5), moving=False)
    return values_of(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inputs", "forward", "backward", "return"])
def test_a_device_with_a_store_can_be_restarted_at_any_time(kind, tmp_path):
    case, trainer = federation()
    devices = Devices(case, tmp_path)
    devices.before = lambda device, task: (
        devices.restart(device) if task.kind == kind and task.step > 1 else None
    )
    records = take(trainer, devices, range(1, 5), moving=False)
    assert [record.skipped for record in records] == [None] * 4
    assert_alike(trainer.values(), without_restarts(), case, far=1e-5)


@pytest.mark.slow
def test_one_without_loses_what_it_learned_since_it_was_asked(caplog):
    case, trainer = federation()
    devices = Devices(case)
    take(trainer, devices, range(1, 3), moving=False)
    returned = values_of(trainer)
    take(trainer, devices, [3], moving=False)
    devices.restart("b")
    plan = next(plans(trainer, [4], moving=False))
    record = trainer.complete_round(
        replace(plan, operations=np.full_like(plan.operations, Operation.FORWARD)),
        devices,
    )
    assert record.skipped is None
    assert (
        "device b no longer has its part of layer 1 (feed-forward): it is as it "
        in (caplog.text)
    )
    values = trainer.values()
    # It held layer 1, whose values went on from those returned by one step without
    # gradient.
    name = "roberta.encoder.layer.1.output.dense.weight"
    lr = STEP["lr"]
    assert 0 < abs(values[name] - returned[name]).max() < 2 * lr
    sent = [d for d, one in devices.asked("forward") if "values" in one.arrays]
    assert sent[6:] == ["b", "b"]


@pytest.mark.slow
def test_one_without_that_is_restarted_within_a_step_costs_the_step():
    case, trainer = federation()
    devices = Devices(case)
    take(trainer, devices, [1], moving=False)
    before = values_of(trainer)
    devices.before = lambda device, task: (
        devices.restart(device) if (device, task.kind) == ("b", "backward") else None
    )
    (record,) = take(trainer, devices, [2], moving=False)
    assert record.skipped.startswith("device b: it does not have the 'values' that it")
    assert "give its device a store" in record.skipped
    assert_same(trainer.values(), before)


@pytest.mark.slow
def test_a_device_that_is_gone_leaves_what_it_returned_to_the_others():
    case, trainer = federation(return_every=2)
    devices = Devices(case)
    take(trainer, devices, range(1, 3), moving=False)
    returned = {n: v.copy() for n, v in trainer._held.known().items()}
    take(trainer, devices, [3], moving=False)
    assert not devices.asked("return")[6:]

    def gone(device, task):
        if device == "b":
            raise PartFailed({"b": "no reply"})

    devices.before = gone
    (record,) = take(trainer, devices, [4], moving=False)
    assert record.skipped == "device b: no reply"
    plan = trainer.plan_round(5, ["a", "c"])
    assert plan.device_ids == ("a", "c")
    nothing = np.full_like(plan.operations, Operation.FORWARD)
    record = trainer.complete_round(replace(plan, operations=nothing), devices)
    assert record.skipped is None
    sent = [one for _, one in devices.asked("forward") if one.task.step == 5]
    assert any("values" in one.arrays for one in sent)
    assert all(("values" in one.arrays) == ("moments" in one.arrays) for one in sent)
    # Layer 1, which b held, is as b returned it; layer 0 is as a has it now.
    name = "roberta.encoder.layer.{}.output.dense.weight"
    own = case.model.get_parameter(name.format(1))
    one = next(o for o in sent if (o.task.layer_index, o.task.branch_index) == (1, 1))
    groups = one.task.last_group - one.task.first_group
    width = own.shape[1] // 4
    size = groups * width * own.shape[0]
    first = one.task.first_group * width
    expected = returned[name.format(1)][:, first : first + groups * width]
    np.testing.assert_array_equal(one.arrays["values"][-size:], expected.ravel())
    assert not np.array_equal(
        trainer.values()[name.format(0)], returned[name.format(0)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward", "backward", "loss"])
def test_a_step_that_is_given_up_leaves_no_trace(kind):
    case, trainer = federation()
    devices = Devices(case)

    def fail(device, task):
        # After others have done theirs.
        if (
            task.step == 2
            and task.kind == kind
            and (device, task.branch_index)
            in (
                ("a", 0),
                ("b", 0),
            )[: 1 + (kind != "backward")]
        ):
            raise PartFailed({}, "the network is gone")

    devices.before = fail
    records = take(trainer, devices, range(1, 5), moving=False)
    assert [bool(r.skipped) for r in records] == [False, True, False, False]
    there = [*plans(trainer, range(1, 5), moving=False)]
    _, optimizer = in_one_process(case, there, left_out={2})
    assert_alike(trainer.values(), optimizer.state(), case)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "roberta-lora"])
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(family, tmp_path):
    case, whole = federation(family)
    take(whole, Devices(case), range(1, 7))
    _, first = federation(family)
    take(first, Devices(case), range(1, 4))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, first.snapshot())
    _, second = federation(family)
    second.restore(checkpoints.latest()[0])
    meet(second)
    take(second, Devices(case), range(4, 7))
    assert_same(second.values(), whole.values())
    again, expected = second.snapshot().arrays, whole.snapshot().arrays
    assert again.keys() == expected.keys()
    assert_same(again, expected)


LIES = {
    "moments": lambda name, array: -abs(array) - 1 if name == "moments" else array,
    "values": lambda name, array: np.full_like(array, 1e6),
    "not a number": lambda name, array: np.full_like(array, np.nan),
    "short": lambda name, array: array[:-1],
}


@pytest.mark.parametrize("how", rest_slow(LIES))
def test_what_is_returned_is_not_believed(how):
    case, trainer = federation()
    devices = Devices(case)
    take(trainer, devices, [1], moving=False)
    start = {n: v.copy() for n, v in trainer._held.known().items()}

    def lie(device, task, reply):
        if (device, task.kind) != ("b", "return"):
            return reply
        arrays = {
            name: npy(LIES[how](name, np.frombuffer(data[-n:], "<f4").copy()))
            for name, data in reply.arrays.items()
            for n in [len(data) - 128]
        }
        return PartReply(arrays, reply.report)

    devices.alter = lie
    trainer.collect()
    values = trainer._held.known()
    for layer, as_before in ((0, False), (1, True), (2, False)):
        name = f"roberta.encoder.layer.{layer}.output.dense.weight"
        assert np.array_equal(values[name], start[name]) == as_before
    assert trainer.plan_round(2, DEVICES).device_ids == ("a", "c"), "it rests"


def test_a_device_that_always_lacks_something_fails():
    case, trainer = federation()
    devices = Devices(case)

    def lack(device, task, reply):
        if (device, task.kind) != ("b", "forward"):
            return reply
        return PartReply({}, {**reply.report, "lacks": "values"})

    devices.alter = lack
    (record,) = take(trainer, devices, [1], moving=False)
    assert record.skipped.startswith("device b: it does not have the 'values'")


def test_options_that_cannot_be_sent_are_refused():
    with pytest.raises(
        UserError, match="its options must be numbers, texts, and lists"
    ):
        federation(lr=torch.tensor(1e-2), optimizer="AdamW")
