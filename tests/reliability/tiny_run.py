"""A whole run in this process: Flower's loop, the real strategy, devices that train.

The devices are ``BlockDevice``s with a three-layer RoBERTa; what is not real is what
carries the messages, and the time that devices report.
"""

from __future__ import annotations

import torch
import transformers
from flwr.app import Context, RecordDict
from flwr.client import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.build import coordinator_for
from lola_flwr.clients import BlockClient, BlockDevice, LoLaClient
from lola_flwr.costs.of_model import model_costs
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.run.directory import RunDirectory
from lola_flwr.strategies import LoLaDeft, message
from lola_flwr.strategies.run_rounds import run_rounds
from lola_flwr.system.devices import simulated_device
from tests.conftest import SMALL
from tests.flat_settings import grouped
from tests.strategies.in_process import InProcessGrid

BATCH = 4


def tiny_model():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=40)
    return transformers.RobertaForSequenceClassification(config)


def make_coordinator(model, partition, *, batch_size=BATCH, **options):
    options = {"bandwidth_hz": 1e6, "lr": 1e-2, "rotation_eps": 0.2, **options}
    costs = model_costs(model, partition, batch_size=batch_size, sequence_length=10)
    return coordinator_for(
        model, partition, costs=costs, batch_size=batch_size, **grouped(options)
    )


def make_device(index, model, partition, store=None):
    def draw_batch(server_round, size):
        generator = torch.Generator().manual_seed(1000 * server_round + index)
        input_ids = torch.randint(5, 60, (size, 10), generator=generator)
        return {"input_ids": input_ids, "labels": (input_ids[:, 0] > 30).long()}

    return BlockDevice(
        profile=simulated_device(index, seed=2),
        load_model=lambda: (model, partition),
        batch_source=draw_batch,
        store=store,
        # Slower than the profile says, each by another factor: there is to learn.
        simulated_compute_s=lambda a: 1e-3 * (1 + index) * (4 - a.block_index),
    )


def run(
    directory,
    *,
    num_rounds,
    interface="message",
    num_devices=5,
    first_node=100,
    make_grid=InProcessGrid,
    on_plan=lambda server_round: None,
    on_round=lambda record: None,
    configuration=None,
    options=None,
    make_model=tiny_model,
    store=None,
):
    """Run, or go on with, a run of ``num_rounds``; return its coordinator.

    ``first_node`` is the id of the first device: another start of the same devices has
    other ids. ``on_plan`` is called with a round's number before it is planned.
    """
    for name in ("_run_id", "_task_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    torch.set_num_threads(1)
    model = make_model()
    partition = model_partition(model)
    coordinator = make_coordinator(model, partition, **(options or {}))

    def device_fn(context):
        return make_device(context.node_id - first_node, model, partition, store)

    def client_fn(context):
        return BlockClient(device_fn(context)).to_client()

    plan_round = coordinator.plan_round

    def plan(server_round, devices):
        on_plan(server_round)
        return plan_round(server_round, devices)

    coordinator.plan_round = plan

    app = LoLaClient(device_fn) if interface == "message" else ClientApp(client_fn)
    grid = make_grid({first_node + index: app for index in range(num_devices)})
    with RunDirectory(
        directory, coordinator, configuration=configuration or {}
    ) as files:

        def finish(record):
            files.on_round(record)
            on_round(record)

        if interface == "message":
            strategy = message.LoLaDeft(
                coordinator, min_available_nodes=num_devices, on_round=finish
            )
            strategy.start(grid, strategy.initial_arrays(), num_rounds)
        else:
            strategy = LoLaDeft(
                coordinator, min_available_clients=num_devices, on_round=finish
            )
            context = Context(1, 1, {}, RecordDict(), {})
            run_rounds(grid, context, strategy, num_rounds=num_rounds)
    return coordinator
