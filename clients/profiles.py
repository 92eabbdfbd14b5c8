"""How a device tells its profile, under either of Flower's interfaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Code, Config, GetPropertiesRes, Status
from flwr.common.constant import MessageTypeLegacy
from flwr.compat.common.recorddict_compat import getpropertiesres_to_recorddict

from lola_flwr.clients.node import node_profile
from lola_flwr.errors import UserError
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.records import (
    PROFILE_ACTION,
    PROFILE_KEY,
    SECAGG_KEY,
    SECAGG_REFUSAL,
)


def report_profile(
    app: ClientApp, profile_fn: Callable[[Context], DeviceProfile] = node_profile
) -> None:
    """Let an app of registered functions answer the strategy's question.

    Parameters
    ----------
    app
        The app.
    profile_fn
        Gives the profile of the device that a context belongs to.
    """

    @app.query(PROFILE_ACTION)
    def query(message: Message, context: Context) -> Message:
        return profile_reply(message, profile_fn(context).to_properties())


def profile_reply(message: Message, properties: Mapping[str, str | float]) -> Message:
    """Return the reply to the strategy's question; no properties, if none are known."""
    content = RecordDict({PROFILE_KEY: ConfigRecord({**properties})})
    return Message(content, reply_to=message)


def profile_mod(
    message: Message, context: Context, call_next: ClientAppCallable
) -> Message:
    """Answer the strategy's question for an app of NumPyClients.

    A mod: ``ClientApp(client_fn, mods=[profile_mod])``. The profile is that of
    ``node_profile``.

    Raises
    ------
    UserError
        The server aggregates securely.
    """
    if SECAGG_KEY in message.content.config_records:
        raise UserError(SECAGG_REFUSAL)
    if message.metadata.message_type != MessageTypeLegacy.GET_PROPERTIES:
        return call_next(message, context)
    properties: Config = {**node_profile(context).to_properties()}
    result = GetPropertiesRes(Status(Code.OK, ""), properties)
    return Message(getpropertiesres_to_recorddict(result), reply_to=message)
