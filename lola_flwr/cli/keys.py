"""``lola-flwr keys``: what can be set in an app's run configuration."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lola_flwr.cli.completion import complete_key
from lola_flwr.cli.console import console, print_json
from lola_flwr.cli.paths import LOCAL_PATH
from lola_flwr.errors import UserError, nearest

if TYPE_CHECKING:
    from lola_flwr.cli.app_keys import AppKey

# Longer lines are hard to read.
_WIDTH = 100


def keys(
    app: Annotated[
        Path, typer.Argument(click_type=LOCAL_PATH, help="Directory of the Flower app.")
    ],
    word: Annotated[
        str | None,
        typer.Argument(
            autocompletion=complete_key,
            help="Show those alone that have this in their name or their comment.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the keys of an app's run configuration: default, kind, and what they do.

    Example: `lola-flwr keys simulations/glue`

    Another: `lola-flwr keys simulations/glue codec`
    """
    from lola_flwr.cli.app_keys import app_keys
    from lola_flwr.simulation.flower_app import read_app

    found = app_keys(read_app(app))
    shown = [key for key in found if word is None or _has(key, word)]
    if word is not None and not shown:
        raise UserError(
            f"No key of {app} has {word!r} in its name or its comment."
            f"{nearest(word, [key.name for key in found])}"
        )
    if as_json:
        print_json([asdict(key) for key in shown])
    else:
        _print(shown)


def _has(key: AppKey, word: str) -> bool:
    return word.lower() in f"{key.name} {key.comment}".lower()


def _print(shown: Sequence[AppKey]) -> None:
    from lola_flwr.cli.app_config import as_run_config

    out = console()
    width = min(out.width, _WIDTH)
    for key in shown:
        (default,) = as_run_config({key.name: key.default})
        out.print(Text.assemble((default, "bold"), "  ", (_takes(key), "cyan")))
        if key.comment:
            print(textwrap.indent(textwrap.fill(key.comment, width - 4), " " * 4))


def _takes(key: AppKey) -> str:
    if key.is_closed:
        return " or ".join(key.values)
    return f"{key.kind}, such as {', '.join(key.values)}" if key.values else key.kind
