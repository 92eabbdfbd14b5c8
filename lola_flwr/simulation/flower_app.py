"""A directory with a Flower app, and what it says of itself before it is run."""

from __future__ import annotations

import logging
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lola_flwr.errors import UserError, reason_of
from lola_flwr.machine.heap import nothing_collected


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
    components
        What it runs, ``[tool.flwr.app.components]``: ``"package.module:app"`` as
        ``serverapp`` and as ``clientapp``.
    schema
        ``"package.module:RunConfig"`` that checks the configuration: ``run-config`` of
        ``[tool.lola-flwr]``; None if the app names none.
    check
        ``"package.module:check"``, called with the configuration and the number of
        devices before anything starts: ``check`` of ``[tool.lola-flwr]``. It may return
        a function that looks at what takes the model, called while the processes of
        devices load theirs.
    prepare
        ``"package.module:prepare"``, called with the configuration in each further
        process of devices while the model is checked, so that it loads what its devices
        share: ``prepare`` of ``[tool.lola-flwr]``.
    export
        ``"package.module:exported"``, called with the configuration by ``lola-flwr
        export``; gives what is exported: ``export`` of ``[tool.lola-flwr]``.
    """

    directory: Path
    name: str
    config: Mapping[str, Any]
    components: Mapping[str, str] = field(default_factory=dict)
    schema: str | None = None
    check: str | None = None
    prepare: str | None = None
    export: str | None = None


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
        components=app.get("components", {}),
        schema=own.get("run-config"),
        check=own.get("check"),
        prepare=own.get("prepare"),
        export=own.get("export"),
    )


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


def check_start(
    app: FlowerApp, config: Mapping[str, Any], num_devices: int
) -> Callable[[], None]:
    """Let the app say what would else end its run after everything has started.

    Parameters
    ----------
    app
        The app; one that offers no check is taken to start.
    config
        Its run configuration.
    num_devices
        Devices that will be simulated.

    Returns
    -------
    What looks at what is left, which takes the model; it raises as this does.

    Raises
    ------
    UserError
        What the check says; or it cannot be imported, or fails itself.
    """
    check = named(app, "check", app.check)
    left = None if check is None else _checked(app, partial(check, config, num_devices))

    def look_at_what_is_left() -> None:
        if callable(left):
            _checked(app, left)

    return look_at_what_is_left


def _checked(app: FlowerApp, check: Callable[[], object]) -> object:
    """Call an app's check; return what it returns."""
    try:
        with importable(app.directory), quiet():
            return check()
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
    return named(app, "run-config", app.schema)


def named(app: FlowerApp, key: str, name: str | None) -> Any:
    """Import what an app names in ``[tool.lola-flwr]``; None if it names nothing.

    Parameters
    ----------
    app
        The app.
    key
        Its key there.
    name
        What it says: ``"package.module:name"``.

    Raises
    ------
    UserError
        It cannot be imported.
    """
    if name is None:
        return None
    with importable(app.directory):
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


@contextmanager
def importable(directory: Path) -> Iterator[None]:
    """Let what is in a directory be imported, with all that it imports."""
    sys.path.insert(0, str(directory.resolve()))
    try:
        with nothing_collected():
            yield
    finally:
        sys.path.remove(str(directory.resolve()))


@contextmanager
def quiet() -> Iterator[None]:
    """Hold warnings back: the run itself will warn of the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
