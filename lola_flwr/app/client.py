"""An app's device side under both of Flower's interfaces.

What the device does is in the app's own module of devices, which a resident worker runs
where there is one: this module is loaded for every message, and needs neither model nor
PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.client import Client
from flwr.clientapp import ClientApp

from lola_flwr.app.interface import interface_of
from lola_flwr.clients import BlockClient, LoLaClient
from lola_flwr.device.contract import Device


class TrainingClient(ClientApp):
    """The device under the interface that the run is configured for.

    Parameters
    ----------
    device_fn
        Makes the device.
    """

    def __init__(self, device_fn: Callable[[Context], Device]) -> None:
        def client_fn(context: Context) -> Client:
            client: Client = BlockClient(device_fn(context)).to_client()
            return client

        self._apps = {"legacy": ClientApp(client_fn), "message": LoLaClient(device_fn)}
        super().__init__(client_fn)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        # The server has checked the configuration before it sends anything.
        app = self._apps[interface_of(context.run_config)]
        reply: Message = app(message, context)
        return reply
