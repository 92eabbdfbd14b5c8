"""A function of the user's own, by its place."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from lola_flwr.errors import UserError


def imported(option: str, place: str) -> Callable[..., Any]:
    """Return the function at ``"package.module:function"``.

    Parameters
    ----------
    option
        What it was given for, for the message.
    place
        Where it is.

    Raises
    ------
    UserError
        There is nothing callable.
    """
    try:
        found = resolve_name(place)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{option}={place!r} cannot be imported: {error}. Its package has to be "
            "installed, or its directory on PYTHONPATH."
        ) from None
    if not callable(found):
        raise UserError(f"{option}={place!r} is not a function.")
    function: Callable[..., Any] = found
    return function
