"""The key ``uplink-mbps``: rates of the devices' links, in one text."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from lola_flwr.errors import UserError


def link_rates_bps(text: str) -> tuple[float, ...]:
    """Read the devices' link rates, in Mbit/s: ``"8 4 2 1"``; bit/s come back.

    Raises
    ------
    UserError
        Something else is in the text.
    """
    try:
        rates = tuple(1e6 * float(word) for word in text.replace(",", " ").split())
    except ValueError:
        rates = (0.0,)
    if not all(1e3 <= rate <= 1e12 for rate in rates):
        raise UserError(
            f"uplink-mbps={text!r}: write one rate in Mbit/s for each device, such as "
            "'8 4 2 1'."
        )
    return rates


def _checked(text: str) -> str:
    link_rates_bps(text)
    return text


LinkRates = Annotated[str, AfterValidator(_checked)]
