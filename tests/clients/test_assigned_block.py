"""An existing project's own training under the strategy, in this process."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from flwr.supercore.task_identity import TaskIdentity
from torch import nn
from torch.utils.checkpoint import checkpoint

from lola_flwr.build import ServerStep, coordinator_for_weights
from lola_flwr.clients import (
    AssignedBlock,
    block_mod,
    profile_mod,
    report_profile,
)
from lola_flwr.errors import UserError
from lola_flwr.model.adapters import adapt
from lola_flwr.model.recording import NoGradient
from lola_flwr.strategies import Waits
from lola_flwr.strategies.message import LoLaDeft
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.wire.records import SECAGG_KEY, MalformedRecord
from lola_flwr.zeroth_order.mixing import ZerothOrder
from tests.flat_settings import grouped
from tests.marks import rest_slow
from tests.strategies.in_process import InProcessGrid


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    """Three layers, with buffers, between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(3)
    net = Net()
    net.embed.requires_grad_(False)  # on the server: devices' code need not know
    return net


def fit(model, config, *, steps=3):
    """Train all of the model that wants it, as a project does; return the loss."""
    torch.manual_seed(0)
    x = torch.randn(16, 3).to(model.head.weight.dtype)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        pull = zip(model.parameters(), start, strict=True)
        drift = sum(((p - p0) ** 2).sum() for p, p0 in pull)
        (loss + config.get("proximal-mu", 0.0) / 2 * drift).backward()
        optimizer.step()
    return loss.item()


def reply_content(model, loss):
    metrics = {"num-examples": 16, "train_loss": loss}
    return RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )


def plain_train(message, context):
    """Train as any FedAvg project does."""
    return plain_train_of(Net(), message)


def plain_train_of(model, message):
    model = copy.deepcopy(model)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loss = fit(model, message.content["config"])
    return Message(reply_content(model, loss), reply_to=message)


def prepared_train(message, context):
    """Train with the two lines of AssignedBlock."""
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    block = AssignedBlock(model, message)
    loss = fit(model, message.content["config"])
    return Message(block.finish(reply_content(model, loss), loss), reply_to=message)


def make_app(train, mods=(), profile=True):
    app = ClientApp()
    app.train(mods=list(mods))(train)
    if profile:
        report_profile(app)
    return app


def federate(
    model, app, rounds=1, *, num_devices=4, wrap=lambda strategy: strategy, **options
):
    """Run rounds with some devices; return records, result and replies."""
    grid = InProcessGrid(
        {100 + n: app for n in range(num_devices)},
        {
            100 + n: {"partition-id": n, "num-partitions": num_devices}
            for n in range(num_devices)
        },
    )
    replies = []

    def note(reply):
        if reply.metadata.message_type == "train":
            replies.append(reply)
        return reply

    grid.alter = note
    train_config = options.pop("train_config", None)
    records = []
    strategy = LoLaDeft(
        coordinator_for_weights(
            model,
            batch_size=16,
            **grouped(options, ServerStep(optimizer="SGD", lr=1.0)),
        ),
        on_round=records.append,
        waits=Waits(settle_s=0.1),
    )
    result = wrap(strategy).start(
        grid, ArrayRecord(model.state_dict()), rounds, train_config=train_config
    )
    return records, result, replies


def moved(model, result):
    """Names of the arrays that training has changed."""
    before = model.state_dict()
    return {
        name
        for name, array in result.arrays.items()
        if not np.array_equal(array.numpy(), before[name].numpy())
    }


def all_but_embedding(model):
    return {n for n, _ in model.named_parameters() if not n.startswith("embed")}


def statistics(model):
    return {n for n, _ in model.named_buffers()}


APPS = {
    "prepared": lambda: make_app(prepared_train),
    "mod": lambda: make_app(plain_train, [partial(block_mod, loss_key="train_loss")]),
    "knows nothing": lambda: make_app(plain_train),
}


@pytest.mark.parametrize("kind", APPS)
def test_blocks_move_and_the_rest_stays(model, kind):
    records, result, replies = federate(model, APPS[kind](), rounds=2)
    assert [record.refused for record in records] == [{}, {}]
    assert moved(model, result) == all_but_embedding(model) | statistics(model)
    sent = [len(reply.content["arrays"]) for reply in replies]
    ignored = [block.ignored_arrays for block in records[0].blocks]
    if kind == "knows nothing":
        assert set(sent) == {len(model.state_dict())}
        assert all(ignored)
        assert records[0].train_loss is None
    else:
        assert set(sent) == {2 + 2 + 2 + 3 * 3}
        assert not any(ignored)
        assert records[0].train_loss is not None
        assert all(b.compute_clock == "measured" for b in records[0].blocks)


def test_a_projects_own_adapters():
    def adapted():
        options = {"target_modules": ["linear"], "modules_to_save": ["head"]}
        return adapt(Net(), "lora", options).train()

    def train(message, context):
        model = adapted()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        block = AssignedBlock(model, message)
        loss = fit(model, message.content["config"])
        return Message(block.finish(reply_content(model, loss), loss), reply_to=message)

    torch.manual_seed(3)
    model = adapted()
    records, result, replies = federate(model, make_app(train), rounds=2)
    assert [record.refused for record in records] == [{}, {}]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved(model, result) == trained | statistics(model)
    # The adapter, the head, and the statistics of three layers.
    assert {len(reply.content["arrays"]) for reply in replies} == {2 + 2 + 3 * 3}


def test_the_move_is_the_devices_own_over_the_number_of_blocks(model):
    _, result, replies = federate(model, make_app(prepared_train))
    before = model.state_dict()
    for reply in replies:
        for name, array in reply.content["arrays"].items():
            if name.startswith("head") or name in statistics(model):
                continue
            start = before[name].numpy()
            np.testing.assert_allclose(
                result.arrays[name].numpy() - start,
                (array.numpy() - start) / 3,
                rtol=1e-4,
                atol=1e-7,
            )


@pytest.mark.parametrize(("num_devices", "kind"), rest_slow(product([1, 2], APPS)))
def test_fewer_devices_than_blocks_train_all_of_them(model, kind, num_devices):
    records, result, replies = federate(
        model, APPS[kind](), rounds=2, num_devices=num_devices
    )
    assert [record.refused for record in records] == [{}, {}]
    for record in records:
        trained = [block for part in record.blocks for block in part.blocks]
        assert (trained, len(record.blocks)) == ([0, 1, 2], num_devices)
    assert moved(model, result) == all_but_embedding(model) | statistics(model)
    if num_devices == 1 and kind != "knows nothing":
        # All of the model by one device: that is its own training, as with FedAvg.
        for name, array in replies[-1].content["arrays"].items():
            np.testing.assert_allclose(
                result.arrays[name].numpy(), array.numpy(), rtol=1e-5, atol=1e-7
            )


def test_training_lowers_the_loss(model):
    records, _, _ = federate(model, make_app(prepared_train), rounds=15)
    losses = [record.train_loss for record in records]
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


def test_a_prepared_model_back_propagates_to_its_block_only(model):
    config = federate_config(model, block_index=2)
    with AssignedBlock(model, config) as block:
        fit(model, {}, steps=1)
        wanting = {n for n, p in model.named_parameters() if p.grad is not None}
    assert wanting == {
        f"layers.2.{n}"
        for n in ("linear.weight", "linear.bias", "norm.weight", "norm.bias")
    } | {"head.weight", "head.bias"}
    assert set(block.arrays()) == wanting | statistics(model)
    flags = {name for name, p in model.named_parameters() if p.requires_grad}
    assert flags == all_but_embedding(model), "flags are restored"


def test_a_device_that_trains_all_returns_its_block(model):
    model.layers[0].norm.weight.requires_grad_(False)
    config = federate_config(model, block_index=2, **{"trains-all": True})
    with AssignedBlock(model, config) as block:
        fit(model, {}, steps=1)
        wanting = {n for n, p in model.named_parameters() if p.grad is not None}
    assert wanting == all_but_embedding(model) - {"layers.0.norm.weight"}
    asked = {*config["update-names"].splitlines()}
    assert all(name.startswith(("layers.2.", "head.")) for name in asked)
    assert set(block.arrays()) == asked | statistics(model)


def federate_config(model, *, block_index, **changes):
    coordinator = coordinator_for_weights(model, batch_size=16)
    for index in range(3):
        profile = simulated_device(index, seed=0)
        coordinator.add_device(str(index), profile.to_properties())
    plan = coordinator.plan_round(1, ["0", "1", "2"])
    records = [a.to_record() for a in plan.assignments.values()]
    record = next(r for r in records if r["block-index"] == block_index)
    return {**record, **changes}


@pytest.mark.parametrize(
    ("reentrant", "compiled"),
    [(None, False), (None, True), (False, False), (True, False), (True, True)],
)
def test_a_block_that_got_no_gradient_is_not_returned(model, reentrant, compiled):
    """Re-entrant checkpoints cut off a block whose input wants no gradient."""

    class Checkpointed(Net):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return self.head(x)

    if reentrant is not None:
        model = Checkpointed()
    # The server has the model without: of this one it would refuse to count the costs.
    plain = Net()
    plain.load_state_dict(model.state_dict())
    block = AssignedBlock(model, federate_config(plain, block_index=1))
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run = torch.compile(model, backend="eager") if compiled else model
    run(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    if reentrant:
        with pytest.raises(NoGradient, match=r"layers\.\d.* has no gradient"):
            block.fit_result(16)
    else:
        block.fit_result(16)
        names = block.assignment.update_names.splitlines()
        assert all((model.state_dict()[n] != start[n]).any() for n in names)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_numpy_client_result(model):
    config = federate_config(model, block_index=1)
    block = AssignedBlock(model, config)
    arrays, examples, metrics = block.fit_result(16, {"mine": 1}, loss=0.5)
    assert [array.shape for array in arrays[:6]] == [
        *((4, 4), (4,), (4,), (4,)),
        *((1, 4), (1,)),
    ]
    assert [array.shape for array in arrays[6:]] == [(4,), (4,), ()] * 3
    assert examples == 16
    assert metrics["mine"] == 1
    assert (metrics["update-kind"], metrics["block-index"]) == ("weights", 1)
    assert metrics["loss"] == 0.5
    block = AssignedBlock(model, {**config, "codec": "fp16"})
    with torch.no_grad():
        model.head.bias += 0.25
    arrays, _, metrics = block.fit_result(16)
    assert metrics["update-kind"] == "moves"
    # An exponent, then the gradient that a step with a rate of 1 undoes.
    exponent, value = arrays[5].tolist()
    assert value * 2**exponent == pytest.approx(-0.25, rel=1e-3)
    assert [array.shape for array in arrays[6:]] == [(4,), (4,), ()] * 3


def test_clipping_on_the_device(model):
    def clipped(clipping_norm):
        app = make_app(plain_train, [block_mod, fixedclipping_mod])
        records, _, replies = federate(
            model,
            app,
            wrap=lambda strategy: DifferentialPrivacyClientSideFixedClipping(
                strategy, 0.0, clipping_norm, num_sampled_clients=3
            ),
        )
        assert [record.refused for record in records] == [{}]
        before = model.state_dict()
        return max(
            np.sqrt(
                sum(
                    np.square(array.numpy() - before[name].numpy()).sum()
                    for name, array in reply.content["arrays"].items()
                    if "running" not in name and "batches" not in name
                )
            )
            for reply in replies
        )

    assert clipped(1e-3) <= 1e-3 * 1.01
    assert clipped(1e3) > 0.05


def test_noise_goes_to_what_is_trained_only(model):
    def wrap(strategy):
        return DifferentialPrivacyClientSideFixedClipping(
            strategy, 0.1, 1.0, num_sampled_clients=3
        )

    torch.manual_seed(3)
    app = make_app(prepared_train)
    records, noisy, replies = federate(model, app, rounds=2, wrap=wrap)
    assert [record.refused for record in records] == [{}, {}]
    assert not any(name.startswith("embed") for name in moved(model, noisy))
    assert {len(reply.content["arrays"]) for reply in replies} == {6 + 9}


@pytest.mark.parametrize(
    "wrapper",
    [
        DifferentialPrivacyServerSideFixedClipping,
        DifferentialPrivacyServerSideAdaptiveClipping,
    ],
)
def test_clipping_on_the_server_is_refused(model, wrapper):
    def wrap(strategy):
        options = {"noise_multiplier": 0.1, "num_sampled_clients": 3}
        if wrapper is DifferentialPrivacyServerSideFixedClipping:
            options["clipping_norm"] = 1.0
        return wrapper(strategy, **options)

    with pytest.raises(UserError, match="in the ClientSide class of that name"):
        federate(model, make_app(prepared_train), wrap=wrap)


def test_a_proximal_term_of_the_projects_own(model):
    def drift(mu):
        config = ConfigRecord({"proximal-mu": mu})
        _, result, _ = federate(model, make_app(prepared_train), train_config=config)
        before = model.state_dict()
        return sum(
            float(np.abs(result.arrays[name].numpy() - before[name].numpy()).sum())
            for name in all_but_embedding(model)
        )

    assert drift(10.0) < 0.8 * drift(0.0)


def test_fedadam_by_configuration(model):
    options = {"betas": (0.9, 0.99), "eps": 1e-3}
    _, result, _ = federate(
        model,
        make_app(prepared_train),
        optimizer="Adam",
        lr=0.01,
        optimizer_options=options,
    )
    # Adam's first step is lr * m / (|m| + eps): at most lr, and near it for m >> eps.
    before = model.state_dict()
    largest = max(
        float(np.abs(result.arrays[n].numpy() - before[n].numpy()).max())
        for n in all_but_embedding(model)
    )
    assert 0.009 < largest <= 0.01 + 1e-6


def test_devices_without_a_profile_can_be_given_one(model):
    app = make_app(plain_train, profile=False)
    with pytest.raises(UserError, match="No device has reported a usable profile"):
        federate(model, app)
    assumed = simulated_device(0, seed=0)
    records, _, _ = federate(model, app, assumed_profile=assumed)
    assert [block.status for block in records[0].blocks] == ["accepted"] * 3
    assert len({block.device for block in records[0].blocks}) == 3


def test_statistics_are_the_mean_of_the_devices(model):
    _, result, replies = federate(model, make_app(prepared_train))
    for name in statistics(model):
        sent = [reply.content["arrays"][name].numpy() for reply in replies]
        expected = np.mean(sent, axis=0)
        assert not np.array_equal(expected, model.state_dict()[name].numpy())
        np.testing.assert_allclose(result.arrays[name].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("running_var", -1.0), ("running_mean", 1e9), ("running_mean", float("nan"))],
)
def test_statistics_that_cannot_be_are_refused(model, name, value):
    def lie(message, context):
        reply = prepared_train(message, context)
        arrays = reply.content["arrays"]
        key = f"layers.1.norm.{name}"
        arrays[key] = Array(np.full((4,), value, np.float32))
        return reply

    records, result, _ = federate(model, make_app(lie))
    assert records[0].refused == {"implausible": 3}
    assert moved(model, result) == set()


@pytest.mark.parametrize("kind", APPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_other_types(model, monkeypatch, kind, dtype):
    """They travel as they are; the server steps in float32."""
    make = Net.__init__
    monkeypatch.setattr(Net, "__init__", lambda net: (make(net), net.to(dtype))[0])
    before = dict(copy.deepcopy(model.to(dtype)).named_parameters())
    records, result, _ = federate(model, APPS[kind](), rounds=2)
    assert [record.refused for record in records] == [{}, {}]
    for name, values in before.items():
        array = result.arrays[name].numpy()
        assert array.dtype == values.numpy(force=True).dtype
    assert {n for n in moved(model, result) if n.startswith("layers.0")}


def test_bfloat16_is_refused(model):
    with pytest.raises(UserError, match=r"embed\.weight is of type bfloat16, .*float"):
        coordinator_for_weights(model.bfloat16(), batch_size=16)


def test_buffers_inside_layers_do_not_matter(model):
    """The mod knows names of arrays only; the server says which are to be returned."""
    for index, layer in enumerate(model.layers):
        layer.register_buffer(f"mask_{index}", torch.ones(2))

    def train(message, context):
        reply = plain_train_of(model, message)
        return reply

    records, result, replies = federate(model, make_app(train, [block_mod]))
    assert records[0].refused == {}
    assert moved(model, result) == all_but_embedding(model) | {
        name for name in statistics(model) if "mask" not in name
    }
    assert not any("mask" in n for r in replies for n in r.content["arrays"])


def test_a_server_that_expects_gradients(model):
    config = federate_config(model, block_index=0)
    del config["update-names"]
    with pytest.raises(UserError, match="make the server's coordinator with"):
        AssignedBlock(model, config)


def test_a_model_without_the_block(model):
    config = federate_config(model, block_index=2)
    model.layers = model.layers[:2]
    with pytest.raises(UserError, match=r"asks for layers\.2\..*, which this model"):
        AssignedBlock(model, config)


def message_to(model, records):
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), **records})
    return Message(content, dst_node_id=1, message_type="train")


def test_secure_aggregation_is_refused(model):
    config = ConfigRecord(federate_config(model, block_index=0))
    message = message_to(model, {"config": config, SECAGG_KEY: ConfigRecord()})
    with pytest.raises(UserError, match="a block comes from one device"):
        AssignedBlock(model, message)
    with pytest.raises(UserError, match="a block comes from one device"):
        block_mod(message, None, plain_train)
    # Of a legacy app's own client nothing shows which messages brought its config.
    with pytest.raises(UserError, match="a block comes from one device"):
        profile_mod(message, None, plain_train)


def test_another_strategys_message(model):
    message = message_to(model, {"config": ConfigRecord({"lr": 0.1})})
    with pytest.raises(MalformedRecord, match="server-round=None"):
        AssignedBlock(model, message)


def test_another_model(model):
    config = federate_config(model, block_index=0)
    with torch.no_grad():
        model.embed.bias += 1
    other = Net()
    other.load_state_dict(model.state_dict())
    with pytest.raises(UserError, match="load what the server sends"):
        AssignedBlock(other, config)


def test_shared_parameters_are_refused(model):
    model.tail = model.head
    with pytest.raises(UserError, match=r"tail\.weight and head\.weight are one"):
        coordinator_for_weights(model, batch_size=16)


@pytest.mark.parametrize(
    "options",
    rest_slow(
        [
            {"codec": "int8"},
            {"low_rank": LowRankProjection(rank=2)},
            {"codec": "auto"},
            {"codec": "topk:0.1"},
            {"zeroth_order": ZerothOrder(costs=None)},
            {"reduced_schedules": True},
        ],
        2,
    ),
    ids=str,
)
def test_what_is_for_gradients_is_refused_for_weights(roberta, options):
    (name,) = options
    said = rf"^{name}=.* send gradients, and these return"
    with pytest.raises(UserError, match=said):
        coordinator_for_weights(
            roberta, batch_size=16, sequence_length=10, **grouped(options)
        )


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", APPS)
def test_moves_travel_in_a_codec(model, kind, codec):
    """Weights, of which most are larger than their moves, would not survive it."""
    exact, rounded = (
        federate(model, APPS[kind](), rounds=2, codec=c) for c in ("fp32", codec)
    )
    assert [record.refused for record in rounded[0]] == [{}, {}]
    state = model.state_dict()
    for name, array in exact[1].arrays.items():
        move = array.numpy() - state[name].numpy()
        other = rounded[1].arrays[name].numpy() - state[name].numpy()
        difference = np.abs(move - other).max()
        assert difference <= 2**-6 * np.abs(move).max(initial=0.0)
    for reply in rounded[2]:
        arrays = reply.content["arrays"]
        types = {n: a.numpy().dtype.itemsize for n, a in arrays.items()}
        wanted = 4 if kind == "knows nothing" else 2
        assert {types[n] for n in types if n not in statistics(model)} == {wanted}


def test_moves_are_from_what_was_received_whenever_it_is_loaded(model):
    config = ConfigRecord({**federate_config(model, block_index=0), "codec": "fp16"})
    message = message_to(model, {"config": config})
    device_model = copy.deepcopy(model)
    with torch.no_grad():
        device_model.head.bias += 3.0
    block = AssignedBlock(device_model, message)
    device_model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    with torch.no_grad():
        device_model.head.bias += 0.25
    content = block.finish(reply_content(device_model, 0.5))
    exponent, value = content["arrays"]["head.bias"].numpy().tolist()
    assert value * 2**exponent == pytest.approx(-0.25, rel=1e-3)


def test_returned_arrays_of_other_shapes(model):
    def train(message, context):
        reply = plain_train(message, context)
        reply.content["arrays"]["head.weight"] = Array(np.zeros(4, np.float32))
        return reply

    config = ConfigRecord({**federate_config(model, block_index=0), "codec": "fp16"})
    message = message_to(model, {"config": config})
    said = r"head.weight was received with shape \(1, 4\) and is returned with \(4,\)"
    with pytest.raises(UserError, match=said):
        block_mod(message, None, train)


def test_weights_are_planned_as_they_are_sent(model):
    """The codec, and parts of the head's policy, are what devices do."""
    kinds = [{"head": "every"}, {"head": "shallowest"}, {"codec": "fp16"}]
    for options in kinds:
        records, _, replies = federate(model, make_app(prepared_train), **options)
        planned = {b.device: b.payload_bytes for b in records[0].blocks}
        received = {b.device: b.received_bytes for b in records[0].blocks}
        assert len(replies) == len(planned) == 3
        for device, nbytes in received.items():
            # Beside the arrays there are their names, and the message around them.
            assert 0 < planned[device] - nbytes < 900 + 13 * (315 + 128 + 40)
