"""The app's device side: a device with its part of the images."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.client import Client
from flwr.clientapp import ClientApp

from lola_flwr.clients import BlockClient, BlockDevice, LoLaClient
from lola_flwr.clients.node import node_partition, node_profile, states_profile
from lola_flwr.model.backprop import Batch
from lola_flwr.randomness import rng_for
from lola_flwr.wire.records import Assignment
from lola_vision.config import VisionConfig
from lola_vision.model import build, images


def device_fn(context: Context) -> BlockDevice:
    """Make one device: a simulated one, unless the node states a profile."""
    config = VisionConfig.from_run_config(context.run_config)
    index, num_parts = node_partition(context)
    profile = node_profile(context)

    def draw_batch(server_round: int, batch_size: int) -> Batch:
        train, _ = images(config)
        shuffled = rng_for(config.seed, "parts").permutation(len(train.labels))
        part = shuffled[index::num_parts]
        rng = rng_for(config.seed, "batch", server_round, index)
        return train.batch(rng.choice(part, min(batch_size, len(part)), replace=False))

    def simulated_compute_s(assignment: Assignment) -> float:
        costs = build(config)[2].joined([assignment.blocks])
        flops = costs.required_flops([profile])[0, assignment.block_index]
        return float(flops / profile.flops_per_s)

    return BlockDevice(
        profile=profile,
        load_model=lambda: build(config)[:2],
        batch_source=draw_batch,
        seed=config.seed,
        simulated_compute_s=(
            None if states_profile(context.node_config) else simulated_compute_s
        ),
    )


def client_fn(context: Context) -> Client:
    """Make the legacy client of one simulated device."""
    client: Client = BlockClient(device_fn(context)).to_client()
    return client


_APPS = {"legacy": ClientApp(client_fn), "message": LoLaClient(device_fn)}


class VisionClient(ClientApp):
    """The device under the interface that the run is configured for."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        config = VisionConfig.from_run_config(context.run_config)
        reply: Message = _APPS[config.interface](message, context)
        return reply


app = VisionClient()
