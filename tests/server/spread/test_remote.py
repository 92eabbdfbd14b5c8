"""A model that is spread over devices computes what it computes in one process."""

from __future__ import annotations

import copy
import secrets
from dataclasses import replace
from io import BytesIO

import numpy as np
import peft
import pytest
import torch

from lola_flwr.clients import BlockDevice
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.d2ft.operations import Operation
from lola_flwr.d2ft.schedule import place_subnetworks
from lola_flwr.d2ft.subnetworks import Branch, LayerNotUnderstood, parameter_slices
from lola_flwr.d2ft.training import scheduled_gradient
from lola_flwr.device.part import compute_part
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import model_loss
from lola_flwr.model.loading import fingerprint
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.server.spread.exchange import CountedExchange, PartFailed, PartReply
from lola_flwr.server.spread.held import HeldValues
from lola_flwr.server.spread.model import SpreadModel
from lola_flwr.server.spread.places import Place
from lola_flwr.server.spread.remote import spread_gradient
from lola_flwr.server.spread.returns import fetch
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.records import MalformedRecord, PartReport, PartTask
from tests.d2ft.cases import FAMILIES, Case, make
from tests.marks import rest_slow
from tests.server.coordinators import npy

SKIP, FORWARD, FULL = Operation.SKIP, Operation.FORWARD, Operation.FULL
DEVICES = ["a", "b", "c"]
# So large that what a step moves has all digits of the gradient.
LR = 1024.0
# The first device owns two of the micro-batches; they are of different sizes.
DRAWS = {"a": [1, 3], "b": [2], "c": [4]}


def micro_batches(case):
    parts = [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
    found = [{name: t[part] for name, t in case.batch.items()} for part in parts]
    if "input_ids" in case.batch:
        found[3] = {n: t[:, :8] if t.ndim > 1 else t for n, t in found[3].items()}
    return found


class Devices:
    """Devices with models of their own, in which trained values are nonsense."""

    def __init__(self, case, *, training=False):
        self.models = {device: copy.deepcopy(case.model) for device in DEVICES}
        for model in self.models.values():
            model.train(training)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in case.trainable:
                        parameter.fill_(0.5)
        self.case = case
        self.asked = []
        self.alter = lambda device, task, reply: reply

    def __call__(self, requests):
        self.asked += [
            (device, request.task.kind, request) for device, request in requests.items()
        ]
        return {device: self.reply(device, one) for device, one in requests.items()}

    def reply(self, device, request):
        report, arrays = compute_part(
            self.models[device],
            self.case.partition,
            type(request.task).from_record(request.task.to_record()),
            request.arrays,
            draw=lambda number, _: micro_batches(self.case)[number - 1],
            loss_function=model_loss,
            batch_weight=self.case.batch_weight,
        )
        reply = PartReply(
            {name: npy(array) for name, array in arrays.items()}, report.to_record()
        )
        return self.alter(device, request.task, reply)


def held_values(case, subnetworks, **options):
    parameters = dict(case.model.named_parameters())
    values = {name: parameters[name].detach().numpy() for name in case.trainable}
    return HeldValues(
        ServerOptimizer(values, **(options or {"optimizer": "SGD", "lr": LR})),
        case.model,
        case.partition,
        subnetworks,
    )


def spread(case, devices, *, num_groups=None, speeds=(1, 1, 1), seed=3, held=None):
    subnetworks = find_subnetworks(case.model, case.partition, num_groups=num_groups)
    return SpreadModel(
        model=case.model,
        partition=case.partition,
        subnetworks=subnetworks,
        device_of=place_subnetworks(subnetworks.count, speeds),
        device_ids=DEVICES,
        exchange=devices,
        task=PartTask(
            kind="",
            step=5,
            base_fingerprint="f",
            seed=seed,
            num_groups=subnetworks.num_groups,
            trainer_id=secrets.randbits(62),
        ),
        held=held or held_values(case, subnetworks),
    )


def gradient_of(model, *arguments, **options):
    """Loss and whole gradient of a step, by how far it moves what devices hold."""
    found = spread_gradient(model, *arguments, **options)
    held, step = model.held, model.task.step
    before = {name: values.copy() for name, values in held.known().items()}
    own = {name: gradient.numpy() for name, gradient in found.gradients.items()}
    held.step(own, step, 1.0, found.places)
    exchange = CountedExchange(model.exchange)
    unknown = held.unknown(moments=True)
    assert not fetch(held, unknown, exchange, model.task, moments=True)
    moved = {
        name: (torch.from_numpy(before[name] - values) / LR)
        for name, values in held.known().items()
    }
    squares = sum(
        float(part.square().sum())
        for parts in parameter_slices(model.subnetworks, moved)
        for part in parts
    )
    assert float(found.squares.sum()) == pytest.approx(squares, rel=1e-3)
    return replace(found, gradients=moved)


def in_one_process(case, operations, num_groups=None):
    subnetworks = find_subnetworks(case.model, case.partition, num_groups=num_groups)
    return scheduled_gradient(
        case.model,
        subnetworks,
        case.trainable,
        micro_batches(case),
        operations,
        batch_weight=case.batch_weight,
    )


@pytest.fixture(params=rest_slow(FAMILIES, 2))
def case(request):
    return make(request.param)


def assert_alike(found, expected):
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_gradients_alike(found.gradients, expected.gradients)


def assert_gradients_alike(found, expected):
    """Compare norms: most gradients of so small a model are tiny."""
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-7 * largest, name


@pytest.mark.parametrize(
    "num_groups", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 1))]
)
def test_the_gradient_is_that_of_one_process(case, rng, num_groups):
    count = 3 * (num_groups or 4)
    for operations in (
        np.full((count, 4), FULL),
        rng.integers(0, 3, (count, 4)),
        rng.integers(0, 2, (count, 4)),  # nothing flows back
        rng.integers(0, 2, (count, 1)) * 2 + np.zeros((1, 4), np.int64),
    ):
        devices = Devices(case)
        model = spread(case, devices, num_groups=num_groups, speeds=(1, 2, 3))
        found = gradient_of(model, DRAWS, 6, operations, example_weight=10)
        assert_alike(found, in_one_process(case, operations, num_groups))


def test_who_has_nothing_to_do_is_not_asked(case):
    devices = Devices(case)
    operations = np.full((12, 4), FULL)
    operations[4:8, 1:] = SKIP  # all of layer 1, on device "b"
    operations[4:8, 0] = FORWARD
    model = spread(case, devices)
    spread_gradient(model, DRAWS, 6, operations, example_weight=10)
    asked = [
        (device, kind, request.task.layer_index)
        for device, kind, request in devices.asked
        if kind in ("forward", "backward")
    ]
    assert asked == [
        *[("a", "forward", 0), ("a", "forward", 0)],
        *[("b", "forward", 1), ("b", "forward", 1)],
        *[("c", "forward", 2), ("c", "forward", 2)],
        *[("c", "backward", 2), ("c", "backward", 2)],
        *[("a", "backward", 0), ("a", "backward", 0)],
    ]
    lengths = {
        device: len(request.task.sizes.split())
        for device, kind, request in devices.asked
        if kind == "forward"
    }
    assert lengths == {"a": 4, "b": 1, "c": 4}
    last = devices.asked[-1][2].task
    first = case.subnetworks.layers[0]
    names = {id(p): n for n, p in case.model.named_parameters()}
    before_it = {names[id(p)] for p in first.norm_1.parameters() if first.norm_first}
    assert last.wants_inputs == bool(before_it & {*case.trainable})


def test_only_those_are_asked_to_go_back_who_train_or_pass_on():
    case = make("roberta")
    lora = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=2,
        target_modules=["intermediate.dense"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(case.model.train(False), lora).eval()
    case = Case(model, case.batch)
    devices = Devices(case)
    operations = np.full((3 * 4, 4), FULL)
    subnetworks = find_subnetworks(case.model, case.partition)
    operations = operations[: subnetworks.count]
    found = gradient_of(spread(case, devices), DRAWS, 6, operations)
    expected = scheduled_gradient(
        case.model, subnetworks, case.trainable, micro_batches(case), operations
    )
    assert_alike(found, expected)
    asked = [
        (request.task.layer_index, request.task.branch_index)
        for _, kind, request in devices.asked
        if kind == "backward"
    ]
    assert (0, 0) not in asked, "below the first layer's feed-forward part is nothing"
    assert (0, 1) in asked


def test_owners_are_asked_for_their_own_and_send_no_labels(case):
    devices = Devices(case)
    seen = []
    devices.alter = lambda device, task, reply: (
        seen.append((device, task, reply)) or (reply)
    )
    model, operations = spread(case, devices), np.full((12, 4), FULL)
    spread_gradient(model, DRAWS, 6, operations, example_weight=10)
    for _, task, reply in seen:
        expected = {
            "inputs": {"hidden", "masks"},
            "forward": {"hidden"},
            "backward": {"slopes"} if task.wants_inputs else set(),
            "loss": {"slopes", "gradients"},
        }[task.kind]
        if task.kind == "backward":
            place = (task.layer_index, Branch(task.branch_index))
            groups = task.first_group, task.last_group
            if model.held.slices(Place(*place, *groups)).shared:
                expected = {*expected, "gradients"}  # of what is not cut
        assert {*reply.arrays} == expected
    for kind in ("inputs", "loss"):
        numbers = {device: t.numbers for device, t, _ in seen if t.kind == kind}
        assert numbers == {"a": "1 3", "b": "2", "c": "4"}


def with_dropout(case):
    for module in case.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    case.model.train()
    return case


def test_dropout_is_the_same_on_both_ways():
    """Two runs agree, and moving along the gradient changes the loss as it says."""
    case = with_dropout(make("roberta"))
    operations = np.full((12, 4), FULL)

    def loss_and_gradients():
        torch.manual_seed(4)
        return gradient_of(
            spread(case, Devices(case, training=True)), DRAWS, 6, operations
        )

    first, again = loss_and_gradients(), loss_and_gradients()
    assert first.loss == again.loss
    # Of what devices hold; small gradients drown in rounding.
    held = {piece.name for pieces in case.subnetworks.slices for piece in pieces}
    name = max(held, key=lambda name: first.gradients[name].norm())
    gradient = first.gradients[name]
    step = 1e-2 / gradient.norm()
    parameter = dict(case.model.named_parameters())[name]
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter += sign * step * gradient
        losses.append(loss_and_gradients().loss)
        with torch.no_grad():
            parameter -= sign * step * gradient
    slope = (losses[0] - losses[1]) / (2 * float(step))
    assert slope == pytest.approx(float(gradient.square().sum()), rel=0.05)
    assert first.loss != pytest.approx(in_one_process(case, operations).loss, rel=1e-4)


def test_what_runs_forward_only_changes_no_dropout_of_the_others():
    """The index in a message is another on both ways: masks must not hang on it."""
    case = with_dropout(make("roberta"))
    # The server's own dropout follows from one stream: it is turned off.
    for parts in case.subnetworks.layers:
        parts.dropout_1.p = parts.dropout_2.p = 0.0

    def gradients(operation):
        operations = np.full((12, 4), FULL)
        operations[:, :2] = operation
        model = spread(case, Devices(case, training=True))
        return gradient_of(model, DRAWS, 6, operations).gradients

    skipped, forward = gradients(SKIP), gradients(FORWARD)
    # The head learns from what ran forward only; what is behind it is weighted alike.
    for found in (skipped, forward):
        for name in case.partition.head:
            del found[name]
    assert_gradients_alike(forward, skipped)


BAD = {
    "no report": lambda t, r: PartReply(r.arrays, {}),
    "another part's": lambda t, r: PartReply(
        r.arrays, replace(PartReport.from_record(r.report), layer_index=9).to_record()
    ),
    "no arrays": lambda t, r: PartReply({}, r.report),
    "shorter": lambda t, r: PartReply(
        {n: npy(np.zeros(3, np.float32)) for n in r.arrays}, r.report
    ),
    "not finite": lambda t, r: PartReply(
        {
            n: a if n == "masks" else npy(np.full_like(np.load(_file(a)), np.nan))
            for n, a in r.arrays.items()
        },
        r.report,
    ),
    "too large": lambda t, r: PartReply(
        {
            n: a if n == "masks" else npy(np.full_like(np.load(_file(a)), 3e38))
            for n, a in r.arrays.items()
        },
        r.report,
    ),
    "bytes": lambda t, r: PartReply(dict.fromkeys(r.arrays, b"\x93NUMPY"), r.report),
}


def _file(data):
    return BytesIO(data)


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("kind", ["inputs", "forward", "backward", "loss"])
def test_a_bad_reply_names_its_device(how, kind):
    case = make("roberta")
    devices = Devices(case)

    def alter(device, task, reply):
        bad = device == "b" and task.kind == kind
        return BAD[how](task, reply) if bad else reply

    devices.alter = alter
    before = [p.requires_grad for p in case.model.parameters()]
    with pytest.raises(PartFailed, match=r"^device b: "):
        spread_gradient(spread(case, devices), DRAWS, 6, np.full((12, 4), FULL))
    assert [p.requires_grad for p in case.model.parameters()] == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sizes", "1x10 1x10"),  # one micro-batch was asked for
        ("sizes", "900x10"),
        ("sizes", "1x513"),
        ("sizes", "1x-10"),
        ("sizes", "x"),
        ("sizes", ""),
        ("losses", b"123"),
        ("losses", np.array([np.inf], "<f4").tobytes()),
        ("losses", np.array([1e30], "<f4").tobytes()),
        ("weights", "2"),  # of one example
        *rest_slow([("weights", said) for said in ("1 1", "-1", "")], 0),
    ],
)
def test_bad_sizes_and_losses_are_refused(field, value):
    case = make("roberta")
    devices = Devices(case)

    def alter(device, task, reply):
        if device != "b" or task.kind != ("inputs" if field == "sizes" else "loss"):
            return reply
        report = replace(PartReport.from_record(reply.report), **{field: value})
        return PartReply(reply.arrays, report.to_record())

    devices.alter = alter
    with pytest.raises(PartFailed, match=r"^device b: "):
        spread_gradient(spread(case, devices), DRAWS, 6, np.full((12, 4), FULL))


def altered(case, change):
    """Devices whose requests are changed on their way."""
    devices = Devices(case)
    reply = devices.reply
    devices.reply = lambda device, request: reply(device, change(request))
    return devices


def test_values_of_another_model_are_refused_by_the_device():
    case = make("roberta")

    def truncate(request):
        arrays = {n: a[:-1] if n == "values" else a for n, a in request.arrays.items()}
        return replace(request, arrays=arrays)

    with pytest.raises(UserError, match="same model on server and device"):
        spread_gradient(
            spread(case, altered(case, truncate)), DRAWS, 6, np.full((12, 4), FULL)
        )


def test_an_owner_that_draws_another_batch_says_so():
    case = make("roberta")

    def other_batch(request):
        if request.task.kind != "loss":
            return request
        other = {"1 3": "2 2", "2": "1", "4": "1"}[request.task.numbers]
        return replace(request, task=replace(request.task, numbers=other))

    with pytest.raises(UserError, match="the same batch whenever it is asked"):
        spread_gradient(
            spread(case, altered(case, other_batch)), DRAWS, 6, np.full((12, 4), FULL)
        )


def test_other_tasks_are_refused():
    case = make("roberta")
    task = replace(spread(case, None).task, kind="dance")
    with pytest.raises(MalformedRecord, match="kind='dance'"):
        compute_part(
            case.model, case.partition, task, {}, draw=None, loss_function=model_loss
        )


def test_rows_of_several_texts_are_refused():
    """Of which no mask of the tokens tells."""
    case = make("llama")
    rows = case.batch["input_ids"]
    positions = torch.arange(10).remainder(5).expand(len(rows), -1)
    case.batch = {"input_ids": rows, "position_ids": positions, "labels": rows}
    with pytest.raises(LayerNotUnderstood, match=r"layer 0 is told .* one text a row"):
        spread_gradient(spread(case, Devices(case)), DRAWS, 6, np.full((12, 4), FULL))


def test_what_has_no_label_weighs_nothing():
    case = make("llama")
    labels = case.batch["labels"].clone()
    labels[2] = -100  # all of the second micro-batch
    case.batch["labels"] = labels
    operations = np.full((12, 4), FULL)
    model = spread(case, Devices(case))
    found = gradient_of(model, DRAWS, 6, operations, example_weight=10)
    assert_alike(found, in_one_process(case, operations))
    case.batch["labels"] = torch.full_like(labels, -100)
    model = spread(case, Devices(case))
    with pytest.raises(PartFailed, match="no token of these micro-batches"):
        spread_gradient(model, DRAWS, 6, operations, example_weight=10)


def test_a_block_device_does_its_part_of_its_own_model_only(tmp_path):
    case = make("roberta")
    device = BlockDevice(
        profile=simulated_device(0, seed=1),
        load_model=lambda: (case.model, case.partition),
        batch_source=lambda number, _: micro_batches(case)[number - 1],
    )
    own = fingerprint(case.model, case.partition.frozen)
    task = replace(
        spread(case, None).task,
        kind="inputs",
        numbers="2 4",
        batch_size=2,
        base_fingerprint=own,
    )
    state = torch.get_rng_state()
    report, arrays = device.compute_part(task, {})
    assert report.sizes == "1x10 2x8"
    assert arrays["hidden"].shape == (26 * 32,)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="frozen base weights"):
        device.compute_part(replace(task, base_fingerprint="other"), {})
    on_disk = replace(device, load_model=lambda: object())
    with pytest.raises(UserError, match="stays on disk"):
        on_disk.compute_part(task, {})
