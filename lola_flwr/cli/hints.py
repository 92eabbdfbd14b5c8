"""What is said of a command line that was not understood."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import click

from lola_flwr.cli.app_config import as_toml
from lola_flwr.errors import UserError
from lola_flwr.simulation.flower_app import FlowerApp, read_app

# How like an app's key an option has to look to be taken for it.
_CLOSE = 0.8
_SUGGESTION = re.compile(r"( Did you mean [^?]*\?)(?=.*\1)")


def what_was_wrong(error: click.ClickException, words: Sequence[str]) -> str:
    """Return what is wrong with a command line, and how to put it right.

    Parameters
    ----------
    error
        What click made of it.
    words
        The command line.
    """
    if isinstance(error, click.NoSuchOption):
        override = _override_meant(error.option_name, words)
        if override is not None:
            return override
    # Both click and typer suggest a command, in the same words.
    return _SUGGESTION.sub("", error.format_message())


def _override_meant(option: str, words: Sequence[str]) -> str | None:
    """Return how an option that is a key of the app on the line is written."""
    app = _app_among(words)
    if app is None:
        return None
    near = difflib.get_close_matches(
        option.lstrip("-").replace("_", "-"), app.config, 1, _CLOSE
    )
    if not near:
        return None
    (key,) = near
    default = app.config[key]
    # An option without a value is a switch that is to be on.
    value = _value_of(option, words) or (
        "true" if isinstance(default, bool) else as_toml(default)
    )
    return (
        f"There is no option {option}; {key!r} is a run-config key of {app.name}, and "
        f"keys are written without dashes: {key}={value}"
    )


def _app_among(words: Sequence[str]) -> FlowerApp | None:
    for word in words:
        try:
            return read_app(Path(word))
        except (UserError, OSError):
            continue
    return None


def _value_of(option: str, words: Sequence[str]) -> str:
    """Return the value that an option was given, "" without one."""
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and not following.startswith("-"):
            return following
    return ""
