"""The app's device side: a simulated device with its part of the images."""

from __future__ import annotations

from flwr.client import Client, ClientApp
from flwr.common import Context

from lola_flwr.clients import BlockClient, BlockDevice
from lola_flwr.randomness import rng_for
from lola_flwr.system.devices import simulated_device
from lola_flwr.truncated_backprop import Batch
from lola_vision.config import VisionConfig
from lola_vision.model import build, images


def client_fn(context: Context) -> Client:
    """Make the client of one simulated device."""
    config = VisionConfig.from_run_config(context.run_config)
    index = int(context.node_config["partition-id"])
    num_parts = int(context.node_config["num-partitions"])
    profile = simulated_device(index, seed=config.seed)

    def draw_batch(server_round: int, batch_size: int) -> Batch:
        train, _ = images(config)
        shuffled = rng_for(config.seed, "parts").permutation(len(train.labels))
        part = shuffled[index::num_parts]
        rng = rng_for(config.seed, "batch", server_round, index)
        return train.batch(rng.choice(part, min(batch_size, len(part)), replace=False))

    device = BlockDevice(
        profile=profile,
        load_model=lambda: build(config)[:2],
        batch_source=draw_batch,
        seed=config.seed,
        simulated_compute_s=lambda assignment: float(
            build(config)[2].flops[assignment.block_index] / profile.flops_per_s
        ),
    )
    client: Client = BlockClient(device).to_client()
    return client


app = ClientApp(client_fn)
