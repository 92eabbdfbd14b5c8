"""What is changed in a Flower app's run configuration."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from lola_flwr.errors import UserError, nearest
from lola_flwr.run.config import RunConfig
from lola_flwr.simulation.flower_app import FlowerApp, schema_of


def read_overrides(app: FlowerApp, words: Sequence[str]) -> dict[str, Any]:
    """Read overrides of an app's configuration, ``rounds=30`` or ``task=cola``.

    Parameters
    ----------
    app
        The app.
    words
        One ``key=value`` each, the value in TOML; a string needs no quotes.

    Raises
    ------
    UserError
        No such key, or a value of another type than the app's own; all faults in one
        line.
    """
    overrides: dict[str, Any] = {}
    faults = []
    for word in words:
        try:
            key, value = _read_override(app, word)
        except UserError as error:
            faults.append(str(error))
        else:
            overrides[key] = value
    if faults:
        raise UserError(" ".join(faults))
    return overrides


def kind_of(value: Any) -> str:
    """Return in words what a key with such a default takes."""
    kinds = {int: "a whole number", float: "a number", bool: "true or false"}
    return kinds.get(type(value), "a string")


def rules_of(app: FlowerApp) -> Mapping[str, Mapping[str, Any]]:
    """Return what JSON Schema says of each key, where the app's schema tells."""
    schema = schema_of(app)
    if isinstance(schema, type) and issubclass(schema, RunConfig):
        return schema.rules()
    return {}


def words_of(rule: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words that a key takes beside values of its default's type."""
    either = rule.get("anyOf", ())
    return tuple(str(each["const"]) for each in either if "const" in each)


def as_run_config(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as ``flwr run --run-config`` takes them."""
    return [f"{key}={as_toml(value)}" for key, value in overrides.items()]


def _read_override(app: FlowerApp, word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals:
        raise UserError(f"{word!r} is no override; write key=value, such as rounds=30.")
    if key not in app.config:
        known = ", ".join(app.config) or "none"
        hint = nearest(key, app.config) or f" Its keys are {known}."
        raise UserError(f"{app.name} has no run-config key {key!r}.{hint}")
    default = app.config[key]
    try:
        value = tomllib.loads(f"_ = {text}")["_"]
    except tomllib.TOMLDecodeError:
        value = text
    if isinstance(default, str) and not isinstance(value, str):
        value = text.strip()
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default) and value not in words_of(
        rules_of(app).get(key, {})
    ):
        raise UserError(
            f"{key}={text} must be {kind_of(default)}, as in {key}={as_toml(default)}."
        )
    if isinstance(value, str) and '"' in value:
        raise UserError(f"{key}={text}: Flower's overrides cannot hold double quotes.")
    return key, value


def as_toml(value: Any) -> str:
    """Return a value as it stands in a TOML file."""
    return tomli_w.dumps({"_": value}).removeprefix("_ = ").strip()
