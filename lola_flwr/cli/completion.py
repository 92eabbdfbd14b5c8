"""What the shell completes: an app's keys, and the values that a key can have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lola_flwr.errors import UserError

if TYPE_CHECKING:
    from lola_flwr.simulation.flower_app import FlowerApp


def complete_key(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the keys of the app on the line that begin so."""
    app = _app(ctx)
    keys = [] if app is None else list(app.config)
    return [key for key in keys if key.startswith(incomplete)]


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return how a word ``key=value`` can go on.

    Parameters
    ----------
    ctx
        The line, as click understands it.
    incomplete
        What there is of the word.
    """
    app = _app(ctx)
    if app is None:
        return []
    key, equals, begun = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in _values(app, key, begun)]
    # bash breaks words at "=", and completes what is behind it alone.
    before = [word for word in ctx.params.get("overrides") or () if word != "="]
    if before and before[-1] in app.config:
        return list(_values(app, before[-1], incomplete))
    return [f"{key}=" for key in app.config if key.startswith(incomplete)]


def _app(ctx: typer.Context) -> FlowerApp | None:
    """Return the app on the line; None if there is none, which is no time to say so."""
    from lola_flwr.simulation.flower_app import read_app

    directory = ctx.params.get("app")
    if directory is None:
        return None
    try:
        return read_app(Path(directory))
    except (UserError, OSError):
        return None


def _values(app: FlowerApp, key: str, begun: str) -> Iterator[str]:
    from lola_flwr.cli.app_keys import app_keys

    with contextlib.suppress(UserError):
        for known in app_keys(app):
            if known.name == key:
                yield from (v for v in known.values if v.startswith(begun))
