"""A device with PyTorch."""

from lola_flwr.clients import LoLaClient, node_partition, node_profile
from lola_native.task import make_device


def device_fn(context):
    """Make the device that a node is."""
    index, _ = node_partition(context)
    config = context.run_config
    return make_device(node_profile(context), index, config["model"], config["data"])


app = LoLaClient(device_fn)
