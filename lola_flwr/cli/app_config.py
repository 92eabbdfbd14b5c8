"""A Flower app's run configuration, checked before anything is started for it."""

from __future__ import annotations

import logging
import sys
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import tomli_w

from lola_flwr.errors import UserError, nearest, reason_of


@dataclass(frozen=True)
class FlowerApp:
    """A directory with a Flower app.

    Parameters
    ----------
    directory
        Where it is.
    name
        The project's name.
    config
        Its run configuration, ``[tool.flwr.app.config]``.
    schema
        ``"package.module:RunConfig"`` that checks the configuration: ``run-config`` of
        ``[tool.lola-flwr]``; None if the app names none.
    check
        ``"package.module:check"``, called with the configuration and the number of
        devices before anything starts: ``check`` of ``[tool.lola-flwr]``.
    """

    directory: Path
    name: str
    config: Mapping[str, Any]
    schema: str | None = None
    check: str | None = None


def read_app(directory: Path) -> FlowerApp:
    """Read an app's ``pyproject.toml``.

    Raises
    ------
    UserError
        There is none, or it is not that of a Flower app.
    """
    path = directory / "pyproject.toml"
    if not path.is_file():
        raise UserError(
            f"{directory} is no Flower app, it has no pyproject.toml; give the app's "
            "directory, such as simulations/glue."
        )
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}.") from None
    tool = document.get("tool", {})
    app = tool.get("flwr", {}).get("app")
    if app is None:
        raise UserError(
            f"{directory} is no Flower app, its pyproject.toml has no [tool.flwr.app]; "
            "give the app's directory, such as simulations/glue."
        )
    own = tool.get("lola-flwr", {})
    return FlowerApp(
        directory=directory,
        name=str(document.get("project", {}).get("name", directory.resolve().name)),
        config=dict(_flat(app.get("config", {}))),
        schema=own.get("run-config"),
        check=own.get("check"),
    )


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


def check_config(app: FlowerApp, config: Mapping[str, Any]) -> None:
    """Let the app's own schema check a configuration.

    Raises
    ------
    UserError
        What the schema says; or the app names a schema that cannot be imported.
    """
    schema = schema_of(app)
    if schema is not None:
        schema.from_run_config(config)


def check_start(app: FlowerApp, config: Mapping[str, Any], num_devices: int) -> None:
    """Let the app say what would else end its run after everything has started.

    Parameters
    ----------
    app
        The app; one that offers no check is taken to start.
    config
        Its run configuration.
    num_devices
        Devices that will be simulated.

    Raises
    ------
    UserError
        What the check says; or it cannot be imported, or fails itself.
    """
    check = _named(app, "check", app.check)
    if check is None:
        return
    try:
        with _importable(app.directory), _quiet():
            check(config, num_devices)
    except UserError:
        raise
    # It is the app's code.
    except Exception as error:
        raise UserError(
            f"check={app.check!r} of {app.directory} fails: {reason_of(error)}."
        ) from error


def schema_of(app: FlowerApp) -> Any:
    """Return what checks an app's configuration; None if the app names nothing.

    Raises
    ------
    UserError
        It cannot be imported.
    """
    return _named(app, "run-config", app.schema)


def kind_of(value: Any) -> str:
    """Return in words what a key with such a default takes."""
    kinds = {int: "a whole number", float: "a number", bool: "true or false"}
    return kinds.get(type(value), "a string")


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
    if type(value) is not type(default):
        raise UserError(
            f"{key}={text} must be {kind_of(default)}, as in {key}={as_toml(default)}."
        )
    if isinstance(value, str) and '"' in value:
        raise UserError(f"{key}={text}: Flower's overrides cannot hold double quotes.")
    return key, value


def _named(app: FlowerApp, key: str, name: str | None) -> Any:
    """Import what an app names in ``[tool.lola-flwr]``; None if it names nothing."""
    if name is None:
        return None
    with _importable(app.directory):
        try:
            return resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"{key}={name!r} in {app.directory}/pyproject.toml cannot be "
                f"imported: {error}."
            ) from None


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give a table's keys as Flower does, those of inner tables as ``outer.inner``."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_toml(value: Any) -> str:
    """Return a value as it stands in a TOML file."""
    return tomli_w.dumps({"_": value}).removeprefix("_ = ").strip()


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    sys.path.insert(0, str(directory.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(directory.resolve()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold warnings back: the run itself will warn of the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
