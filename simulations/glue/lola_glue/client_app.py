"""The app's device side under both of Flower's interfaces.

What the device does is in ``device.py``, which a resident worker runs where there is
one: this module is loaded for every message, and needs neither model nor PyTorch.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.client import Client
from flwr.clientapp import ClientApp

from lola_flwr.clients import BlockClient, LoLaClient
from lola_flwr.deployment.shim import resident
from lola_glue.interface import interface_of

device_fn = resident("lola_glue.device:device_fn")


def client_fn(context: Context) -> Client:
    """Make the legacy client of one simulated device."""
    client: Client = BlockClient(device_fn(context)).to_client()
    return client


_APPS = {"legacy": ClientApp(client_fn), "message": LoLaClient(device_fn)}


class GlueClient(ClientApp):
    """The device under the interface that the run is configured for."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        # The server has checked the configuration before it sends anything.
        app = _APPS[interface_of(context.run_config)]
        reply: Message = app(message, context)
        return reply


app = GlueClient()
