"""An existing project: its model, its own training, and rounds in this process."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lola_flwr.build import ServerStep, coordinator_for_weights
from lola_flwr.clients import AssignedBlock, block_mod, report_profile
from lola_flwr.strategies import Waits
from lola_flwr.strategies.message import LoLaDeft
from lola_flwr.system.devices import simulated_device
from tests.flat_settings import grouped
from tests.strategies.in_process import InProcessGrid
from tests.strategies.projects import Net


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


def federate_config(model, *, block_index, **changes):
    coordinator = coordinator_for_weights(model, batch_size=16)
    for index in range(3):
        profile = simulated_device(index, seed=0)
        coordinator.add_device(str(index), profile.to_properties())
    plan = coordinator.plan_round(1, ["0", "1", "2"])
    records = [a.to_record() for a in plan.assignments.values()]
    record = next(r for r in records if r["block-index"] == block_index)
    return {**record, **changes}


def message_to(model, records):
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), **records})
    return Message(content, dst_node_id=1, message_type="train")
