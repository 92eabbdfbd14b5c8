"""An existing project's own training under the strategy, in this process."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from lola_flwr.clients import AssignedBlock, block_mod, node_profile, report_profile
from lola_flwr.errors import UserError
from lola_flwr.model_setup import coordinator_for_weights
from lola_flwr.protocol import SECAGG_KEY, MalformedRecord
from lola_flwr.strategies.message import LoLaDeft
from lola_flwr.system.devices import InvalidProfile, simulated_device
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
    return Net()


def fit(model, config, *, steps=3):
    """Train all of the model that wants it, as a project does; return the loss."""
    torch.manual_seed(0)
    x = torch.randn(16, 3)
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
    model = Net()
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


def federate(model, app, rounds=1, *, wrap=lambda strategy: strategy, **options):
    """Run rounds with four devices; return records, result and replies."""
    grid = InProcessGrid(
        {100 + n: app for n in range(4)},
        {100 + n: {"partition-id": n, "num-partitions": 4} for n in range(4)},
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
        coordinator_for_weights(model, batch_size=16, **options),
        on_round=records.append,
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


APPS = {
    "prepared": lambda: make_app(prepared_train),
    "mod": lambda: make_app(plain_train, [partial(block_mod, loss_key="train_loss")]),
    "knows nothing": lambda: make_app(plain_train),
}


@pytest.mark.parametrize("kind", APPS)
def test_blocks_move_and_the_rest_stays(model, kind):
    records, result, replies = federate(model, APPS[kind](), rounds=2)
    assert [record.refused for record in records] == [{}, {}]
    assert moved(model, result) == all_but_embedding(model)
    sent = [len(reply.content["arrays"]) for reply in replies]
    ignored = [block.ignored_arrays for block in records[0].blocks]
    if kind == "knows nothing":
        assert set(sent) == {len(model.state_dict())}
        assert all(ignored)
        assert records[0].train_loss is None
    else:
        assert set(sent) == {2 + 2 + 2}
        assert not any(ignored)
        assert records[0].train_loss is not None
        assert all(b.compute_clock == "measured" for b in records[0].blocks)


def test_the_move_is_the_devices_own_over_the_number_of_blocks(model):
    _, result, replies = federate(model, make_app(prepared_train))
    before = model.state_dict()
    for reply in replies:
        for name, array in reply.content["arrays"].items():
            if name.startswith("head"):
                continue
            start = before[name].numpy()
            np.testing.assert_allclose(
                result.arrays[name].numpy() - start,
                (array.numpy() - start) / 3,
                rtol=1e-4,
                atol=1e-7,
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
    assert set(block.weights()) == wanting
    assert all(p.requires_grad for p in model.parameters()), "flags are restored"


def federate_config(model, *, block_index, **changes):
    coordinator = coordinator_for_weights(model, batch_size=16)
    for index in range(3):
        profile = simulated_device(index, seed=0)
        coordinator.add_device(str(index), profile.to_properties())
    plan = coordinator.plan_round(1, ["0", "1", "2"])
    records = [a.to_record() for a in plan.assignments.values()]
    record = next(r for r in records if r["block-index"] == block_index)
    return {**record, **changes}


def test_numpy_client_result(model):
    block = AssignedBlock(model, federate_config(model, block_index=1))
    arrays, examples, metrics = block.fit_result(16, {"mine": 1}, loss=0.5)
    assert [array.shape for array in arrays] == [(4, 4), (4,), (4,), (4,), (1, 4), (1,)]
    assert examples == 16
    assert metrics["mine"] == 1
    assert (metrics["update-kind"], metrics["block-index"]) == ("weights", 1)
    assert metrics["loss"] == 0.5


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


def test_a_proximal_term_of_the_projects_own(model):
    def drift(mu):
        config = ConfigRecord({"proximal-mu": mu})
        _, result, _ = federate(model, make_app(prepared_train), train_config=config)
        before = model.state_dict()
        return sum(
            float(np.abs(array.numpy() - before[name].numpy()).sum())
            for name, array in result.arrays.items()
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


def context_of(node_config):
    return Context(1, 77, node_config, RecordDict(), {"seed": 5})


def test_profile_of_a_node():
    stated = {"flops-per-s": 2e11, "memory-bytes": 4_000_000_000, "snr-db": 12.0}
    assert node_profile(context_of(stated)).name == "node 77"
    assert node_profile(context_of({**stated, "name": "phone"})).name == "phone"
    simulated = node_profile(context_of({"partition-id": 3, "num-partitions": 8}))
    assert simulated == simulated_device(3, seed=5)
    with pytest.raises(UserError, match="--node-config"):
        node_profile(context_of({}))
    with pytest.raises(InvalidProfile, match="snr-db"):
        node_profile(context_of({"flops-per-s": 1e9, "memory-bytes": 1e9}))
