"""What strategies that are wrapped around LoLa-DEFT may and may not do."""

from __future__ import annotations

import inspect

from flwr.server import strategy as legacy
from flwr.serverapp import strategy as message

from lola_flwr.errors import UserError

_CLIP_ON_DEVICES = (
    message.DifferentialPrivacyClientSideAdaptiveClipping,
    message.DifferentialPrivacyClientSideFixedClipping,
)
_CLIP_ON_SERVER = (
    legacy.DifferentialPrivacyServerSideAdaptiveClipping,
    legacy.DifferentialPrivacyServerSideFixedClipping,
    message.DifferentialPrivacyServerSideAdaptiveClipping,
    message.DifferentialPrivacyServerSideFixedClipping,
)


def refuse_clipping_on_server() -> None:
    """Refuse one of Flower's wrappers that clip on the server; called by a strategy.

    They subtract the model from each reply before the strategy sees it. A strategy is
    not told what it is wrapped in, so this looks at who calls it.

    Raises
    ------
    UserError
        The strategy was called by such a wrapper.
    """
    wrapper = _wrapper()
    if isinstance(wrapper, _CLIP_ON_SERVER):
        raise UserError(
            f"{type(wrapper).__name__} compares each reply with the whole model, but "
            "devices return one block: wrap the strategy in the ClientSide class of "
            "that name, and clip on the devices."
        )


def refuse_clipping() -> None:
    """Refuse all of Flower's wrappers that clip; called by a strategy.

    Where a model is spread over devices, these send no update that could be clipped.

    Raises
    ------
    UserError
        The strategy was called by such a wrapper.
    """
    wrapper = _wrapper()
    if isinstance(wrapper, (*_CLIP_ON_SERVER, *_CLIP_ON_DEVICES)):
        raise UserError(
            f"{type(wrapper).__name__} clips devices' updates, but with D2FT devices "
            "send hidden states and gradients of such: take the wrapper off, or use "
            "LoLaDeft."
        )


def _wrapper() -> object:
    """Return whatever calls the strategy that has called this module's function."""
    frame = inspect.currentframe()
    caller = (
        frame and frame.f_back and frame.f_back.f_back and frame.f_back.f_back.f_back
    )
    wrapper = caller.f_locals.get("self") if caller else None
    # A frame that knows itself is a cycle, and its callers hold the whole model.
    del frame, caller
    return wrapper
