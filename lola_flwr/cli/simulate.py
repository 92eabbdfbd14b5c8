"""``lola-flwr simulate``: a Flower app in simulation, from start to report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lola_flwr.cli.completion import complete_override
from lola_flwr.cli.console import console, plain_line
from lola_flwr.cli.outcome import print_outcome, report_end
from lola_flwr.cli.paths import LOCAL_PATH
from lola_flwr.cli.signals import terminable
from lola_flwr.errors import UserError
from lola_flwr.machine.files import local_path

if TYPE_CHECKING:
    from lola_flwr.simulation import FinishedRun
    from lola_flwr.simulation.flower_app import FlowerApp

# Up to so many devices Ray's start and messages are what takes long.
_MOST_IN_PROCESS = 16

_Echo = Callable[[str], object]
# Runs the app, and calls what it is given with each line that it prints.
_Run = Callable[[_Echo | None], "FinishedRun"]


class Engine(StrEnum):
    """Where the devices of a simulation compute."""

    AUTO = "auto"
    PROCESS = "process"
    RAY = "ray"

    def is_process(self, num_devices: int) -> bool:
        """Tell whether so many devices compute in this process and those beside it."""
        if self is Engine.AUTO:
            return num_devices <= _MOST_IN_PROCESS
        return self is Engine.PROCESS


# Keys by which an app can be told what this command knows; it need not have them.
_OUTPUT_KEY, _FLEET_KEY, _NUMBER_KEY = "output-dir", "fleet", "num-devices"


def simulate(
    app: Annotated[
        Path, typer.Argument(click_type=LOCAL_PATH, help="Directory of the Flower app.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            autocompletion=complete_override,
            help="Run configuration, as rounds=30 task=cola (lola-flwr keys APP).",
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Devices to simulate.")
    ] = None,
    fleet: Annotated[
        Path | None,
        typer.Option(
            click_type=LOCAL_PATH, help="Fleet file, or presets: simulate them."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            click_type=LOCAL_PATH, help="Where the run's files go [default: runs/...]."
        ),
    ] = None,
    home: Annotated[
        Path, typer.Option(click_type=LOCAL_PATH, help="Where Flower keeps its state.")
    ] = Path("runs/flwr-home"),
    cpus_per_client: Annotated[
        int, typer.Option(min=1, help="CPUs that one client takes.")
    ] = 1,
    engine: Annotated[
        Engine,
        typer.Option(
            help="Where devices compute: in this process and others beside it, as many "
            "as there are cores, or in Flower's engine (Ray) [auto: this process up to "
            f"{_MOST_IN_PROCESS} devices]."
        ),
    ] = Engine.AUTO,
    plain: Annotated[
        bool, typer.Option("--plain", help="Log lines, also on a terminal.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the outcome alone, as JSON.")
    ] = False,
) -> None:
    """Run a Flower app in simulation, from start to report.

    Checks what can be checked before that, runs the app, in processes of its own or
    with a SuperLink of its own, shows the rounds, and stops all that it started.

    Example: `lola-flwr simulate simulations/glue --devices 6 rounds=10`

    Another: `lola-flwr simulate simulations/glue --fleet fleet.toml task=sst-2
    data-dir=path/to/glue`
    """
    try:
        prepared = _prepare(app, overrides or [], devices, fleet, out)
        in_process = engine.is_process(prepared.num_devices)
        engine_of = _in_process if in_process else _in_ray
        with engine_of(prepared, home, cpus_per_client) as run:
            # Seen on a terminal alone: it takes seconds to load a model, which the
            # processes of devices do meanwhile, too.
            with console().status("checking data, model and devices ..."):
                prepared.check_model()
            finished = _followed(run, prepared, plain=plain, silent=as_json)
    except UserError as error:
        if as_json:
            print_outcome("not started", error=str(error))
        raise
    report_end(finished, prepared.directory, as_json=as_json)


@dataclass(frozen=True)
class _Prepared:
    """A run that can start, for all that can be told without the model.

    Parameters
    ----------
    app
        The app.
    config
        Its run configuration, with what this command changes in it.
    changes
        These changes.
    num_devices
        Devices to simulate.
    directory
        Where the run's files go; None if the app does not say.
    check_model
        Looks at what is left, which takes the model.
    """

    app: FlowerApp
    config: Mapping[str, Any]
    changes: Mapping[str, Any]
    num_devices: int
    directory: Path | None
    check_model: Callable[[], None]


def _prepare(
    app: Path,
    overrides: list[str],
    devices: int | None,
    fleet: Path | None,
    out: Path | None,
) -> _Prepared:
    from lola_flwr.cli.app_config import read_overrides
    from lola_flwr.simulation.flower_app import check_config, check_start, read_app

    found = read_app(app)
    changes = read_overrides(found, overrides)
    changes |= _fleet_changes(found.config, fleet)
    config = {**found.config, **changes}
    num_devices = _num_devices(config, devices, fleet)
    if _NUMBER_KEY in config:
        # The first round shall know all of them, or runs are not repeatable.
        changes[_NUMBER_KEY] = num_devices
    directory = None
    # A value that was forgotten: the next word is none.
    if out is not None and str(out).partition("=")[0] in config:
        raise UserError(f"--out is followed by {out}: give it a directory.")
    if _OUTPUT_KEY in config:
        given = str(out or config[_OUTPUT_KEY] or _new_directory(found.name))
        directory = local_path(given).absolute()
        changes[_OUTPUT_KEY] = str(directory)
    elif out is not None:
        raise UserError(f"{found.name} has no {_OUTPUT_KEY} key, so leave --out out.")
    config = {**found.config, **changes}
    check_config(found, config)
    check_model = check_start(found, config, num_devices)
    return _Prepared(found, config, changes, num_devices, directory, check_model)


def _followed(
    run: _Run,
    prepared: _Prepared,
    *,
    plain: bool,
    silent: bool,
) -> FinishedRun:
    """Run it and show what it prints."""
    directory = prepared.directory
    live = sys.stdout.isatty() and not (plain or silent) and directory is not None
    with terminable(), _shown(live, silent, directory, prepared.config) as echo:
        return run(echo)


def _in_process(
    prepared: _Prepared, home: Path, cpus_per_client: int
) -> AbstractContextManager[_Run]:
    from lola_flwr.simulation.process import own_processes

    return own_processes(
        prepared.app,
        num_devices=prepared.num_devices,
        config=prepared.config,
        home=home,
        cpus_per_device=cpus_per_client,
    )


def _in_ray(
    prepared: _Prepared, home: Path, cpus_per_client: int
) -> AbstractContextManager[_Run]:
    from lola_flwr.cli.app_config import as_run_config
    from lola_flwr.simulation import run_app

    def run(echo: _Echo | None) -> FinishedRun:
        return run_app(
            prepared.app.directory,
            num_devices=prepared.num_devices,
            run_config=as_run_config(prepared.changes),
            home=home,
            cpus_per_client=cpus_per_client,
            echo=echo,
        )

    return nullcontext(run)


def _fleet_changes(config: Mapping[str, Any], fleet: Path | None) -> dict[str, Any]:
    if fleet is None:
        return {}
    if _FLEET_KEY not in config:
        raise UserError(
            f"--fleet={fleet}: the app has no {_FLEET_KEY} key, so it cannot simulate "
            "given devices; use --devices."
        )
    from lola_flwr.system.fleet_file import from_anywhere

    return {_FLEET_KEY: from_anywhere(fleet)}


def _num_devices(
    config: Mapping[str, Any], devices: int | None, fleet: Path | None
) -> int:
    """Return how many devices are simulated: all that are said to be there."""
    path = fleet or config.get(_FLEET_KEY) or None
    stated = config.get(_NUMBER_KEY) or None
    if path is not None:
        from lola_flwr.system.fleet_file import read_fleet

        there = len(read_fleet(path))
        if {devices, stated} - {None, there}:
            raise UserError(
                f"{path} has {there} devices, so leave --devices and {_NUMBER_KEY} out."
            )
        return there
    if devices is not None and stated not in (None, devices):
        raise UserError(
            f"--devices={devices}, but {_NUMBER_KEY}={stated}; leave one of them out."
        )
    number = devices or stated
    if number is None:
        raise UserError("How many devices? Give --devices, or --fleet.")
    return int(number)


def _new_directory(name: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = Path("runs") / f"{name}-{stamp}"
    number = 2
    while directory.exists():
        directory = Path("runs") / f"{name}-{stamp}-{number}"
        number += 1
    return directory


@contextmanager
def _shown(
    live: bool, silent: bool, directory: Path | None, config: Mapping[str, Any]
) -> Iterator[_Echo | None]:
    """Give what to call with each line that the run prints."""
    if not live or directory is None:
        yield None if silent else _write
        return
    from rich.live import Live
    from rich.text import Text

    from lola_flwr.cli.live import RunView

    rounds = config.get("rounds")
    view = RunView(
        directory / "rounds.jsonl", rounds if isinstance(rounds, int) else None
    )
    with Live(view, console=console(), refresh_per_second=4) as display:

        def echo(line: str) -> None:
            # The display shows what the other lines say.
            if any(level in line for level in ("WARNING", "ERROR", "Error")):
                display.console.print(Text.from_ansi(line.rstrip()))

        yield echo


def _write(line: str) -> None:
    print(plain_line(line), flush=True)
