"""A device: a model, its part of the data, and a profile."""

from flwr.app import Context

from lola_flwr.clients import BlockDevice, LoLaClient, node_partition, node_profile
from lola_flwr.randomness import rng_for
from quickstart.task import load_data, load_model, make_batch


def device_fn(context: Context) -> BlockDevice:
    """Make the device that a node is; asked with every message."""
    config = context.run_config
    index, num_devices = node_partition(context)
    model, partition, tokenizer = load_model(config["model"], config["data"])
    own = load_data(config["data"])["train"].shard(num_devices, index)

    def draw_batch(server_round: int, batch_size: int):
        rng = rng_for(0, "batch", server_round, index)
        rows = rng.choice(len(own), min(batch_size, len(own)), replace=False)
        return make_batch(own[rows], tokenizer)

    return BlockDevice(
        profile=node_profile(context),
        load_model=lambda: (model, partition),
        batch_source=draw_batch,
    )


app = LoLaClient(device_fn)
