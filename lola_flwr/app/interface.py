"""Which of Flower's two interfaces a run goes by; needs neither model nor PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Interface = Literal["legacy", "message"]


def for_d2ft(interface: Interface) -> Interface:
    """Return D2FT's interface, the one that it has.

    Raises
    ------
    ValueError
        It is the other one.
    """
    if interface != "message":
        raise ValueError('method="d2ft" needs interface="message"; leave interface out')
    return interface


def interface_of(run_config: Mapping[str, object]) -> str:
    """Return the interface that is configured, or where that is "" the method's own.

    D2FT's messages go by no other than "message"; the others' by both, and "legacy" is
    what more projects have.
    """
    configured = str(run_config["interface"])
    return configured or ("message" if run_config.get("method") == "d2ft" else "legacy")
