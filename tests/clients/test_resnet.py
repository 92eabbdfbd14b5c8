"""A ResNet project, whose blocks are given by hand, under both interfaces."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import parameters_to_ndarrays
from flwr.server import Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from torch import nn

from lola_flwr.build import DeviceOptions, RoundSettings, coordinator_for_weights
from lola_flwr.clients import AssignedBlock, block_mod, report_profile
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.errors import UserError
from lola_flwr.strategies import LoLaDeft as LegacyLoLaDeft
from lola_flwr.strategies.message import LoLaDeft
from lola_flwr.system.devices import simulated_device
from tests.model.block_cases import TorchvisionResNet
from tests.strategies.in_process import InProcessGrid

BLOCKS = ["layer1", "layer2", "layer3", "layer4"]
EXAMPLE = torch.zeros(1, 3, 32, 32)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TorchvisionResNet()


def load_data(part):
    """Stripes across or along, on a background that is far from zero."""
    generator = torch.Generator().manual_seed(part)
    labels = torch.arange(24) % 2
    phase = 6 * torch.rand(24, 1, 1, 1, generator=generator)
    across = torch.sin(torch.arange(32) + phase).expand(24, 3, 32, 32)
    images = torch.where(labels[:, None, None, None] == 1, across, across.mT)
    return images + 3, labels


def train(model, part):
    """Train on batches of 8, as a project does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images, labels = load_data(part)
    model.train()
    for x, y in zip(images.split(8), labels.split(8), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def held_out_loss(model, arrays):
    model = copy.deepcopy(model)
    state = {name: torch.tensor(values) for name, values in arrays.items()}
    model.load_state_dict(state)
    images, labels = load_data(1000)
    with torch.no_grad():
        logits = model.eval()(images)
    return nn.functional.cross_entropy(logits, labels).item()


def coordinator_of(model, **options):
    # Compute times are measured here: they must not decide who trains what.
    return coordinator_for_weights(
        model,
        batch_size=24,
        blocks=BLOCKS,
        example=EXAMPLE,
        settings=RoundSettings(devices=DeviceOptions(correct_profiles=False)),
        **options,
    )


def message_run(model, rounds, mods=()):
    """Run the project under the Message API; return the final arrays and records."""

    def train_function(message, context):
        net = copy.deepcopy(model)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        if not mods:
            block = AssignedBlock(net, message)
        train(net, context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": 24})
        content = RecordDict({"a": ArrayRecord(net.state_dict()), "m": metrics})
        return Message(content if mods else block.finish(content), reply_to=message)

    app = ClientApp()
    app.train(mods=list(mods))(train_function)
    report_profile(app)
    grid = InProcessGrid(
        {100 + n: app for n in range(4)},
        {100 + n: {"partition-id": n, "num-partitions": 4} for n in range(4)},
    )
    records = []
    strategy = LoLaDeft(coordinator_of(model), on_round=records.append)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), rounds)
    return {n: a.numpy() for n, a in result.arrays.items()}, records


class Node(ClientProxy):
    """A legacy device in this process."""

    def __init__(self, index, model):
        super().__init__(f"node-{index}")
        self.profile = simulated_device(index, seed=0)
        profile = self.profile

        class Client(NumPyClient):
            def get_properties(self, config):
                return dict(profile.to_properties())

            def fit(self, parameters, config):
                net = copy.deepcopy(model)
                state = zip(net.state_dict(), parameters, strict=True)
                net.load_state_dict({n: torch.tensor(a) for n, a in state})
                block = AssignedBlock(net, config)
                train(net, index)
                return block.fit_result(24)

        self._client = Client().to_client()

    def get_properties(self, ins, timeout, group_id):
        return self._client.get_properties(ins)

    def fit(self, ins, timeout, group_id):
        return self._client.fit(ins)

    evaluate = reconnect = get_parameters = None


def legacy_run(model, rounds):
    records = []
    coordinator = coordinator_of(model)
    strategy = LegacyLoLaDeft(coordinator, on_round=records.append)
    server = Server(client_manager=SimpleClientManager(), strategy=strategy)
    server.disconnect_all_clients = lambda timeout: None
    for index in range(4):
        server.client_manager().register(Node(index, model))
    server.fit(num_rounds=rounds, timeout=None)
    final = parameters_to_ndarrays(server.parameters)
    return dict(zip(coordinator.arrays(), final, strict=True)), records


@pytest.mark.slow
def test_it_learns_and_is_evaluated_with_the_devices_statistics(model):
    before = held_out_loss(model, coordinator_of(model).arrays())
    arrays, records = message_run(model, rounds=8)
    assert [record.refused for record in records] == [{}] * 8
    # Without the statistics that normalize the images' background this is chance.
    after = held_out_loss(model, arrays)
    assert after < 0.8 * before
    initial = {n: v.numpy() for n, v in model.state_dict().items()}
    without = {n: initial[n] if "running" in n else v for n, v in arrays.items()}
    assert held_out_loss(model, without) > after
    # The stem is not trained, but has seen the images.
    np.testing.assert_array_equal(arrays["conv1.weight"], initial["conv1.weight"])
    assert not np.array_equal(arrays["bn1.running_mean"], initial["bn1.running_mean"])
    assert arrays["bn1.num_batches_tracked"] == 8 * 3


def test_both_interfaces_give_the_same_model(model):
    message, records = message_run(model, rounds=2)
    legacy, legacy_records = legacy_run(model, rounds=2)
    assert list(message) == list(legacy)
    for name, values in message.items():
        np.testing.assert_array_equal(values, legacy[name], err_msg=name)
    seen = [[(b.block_index, b.device, b.status) for b in r.blocks] for r in records]
    assert seen == [
        [(b.block_index, b.device, b.status) for b in r.blocks] for r in legacy_records
    ]


def test_an_untouched_train_function(model):
    arrays, records = message_run(model, rounds=1, mods=[block_mod])
    assert records[0].refused == {}
    assert not any(block.ignored_arrays for block in records[0].blocks)
    initial = model.state_dict()
    moved = {n for n, v in arrays.items() if not np.array_equal(v, initial[n].numpy())}
    trained = {n for n, _ in model.named_parameters() if n.startswith(("layer", "fc"))}
    assert trained <= moved


def test_it_needs_an_example(model):
    for known in ({}, {"blocks": BLOCKS}):
        with pytest.raises(UserError, match=r"example=torch\.zeros\(1, 3, 224"):
            coordinator_for_weights(model, batch_size=24, **known)


def test_statistics_stay_fixed_where_gradients_travel(model):
    """Devices then hold the base themselves, and normalize as the server does."""
    coordinator = coordinator_of(model)
    for index in range(4):
        coordinator.add_device(
            str(index), simulated_device(index, seed=0).to_properties()
        )
    assignment = coordinator.plan_round(1, map(str, range(4))).assignments["0"]
    partition = coordinator.partition
    before = {n: b.clone() for n, b in model.named_buffers()}
    images, labels = load_data(0)
    device = BlockDevice(
        profile=simulated_device(0, seed=0),
        load_model=lambda: (model, partition),
        batch_source=lambda *_: {"x": images, "y": labels},
        loss_function=lambda net, batch: nn.functional.cross_entropy(
            net(batch["x"]), batch["y"]
        ),
    )
    state = coordinator.values()
    update = device.train(assignment, {n: state[n] for n in partition.trainable})
    names = partition.update_names(assignment.block_index)
    (gradients,) = update.arrays.values()
    assert gradients.size == sum(state[name].size for name in names)
    for name, values in model.named_buffers():
        assert torch.equal(values, before[name]), name
