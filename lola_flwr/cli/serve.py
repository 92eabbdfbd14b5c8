"""``lola-flwr serve``: a run on a SuperLink, to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lola_flwr.cli.console import plain_line
from lola_flwr.cli.paths import LOCAL_PATH
from lola_flwr.cli.signals import terminable
from lola_flwr.errors import UserError


def serve(
    app: Annotated[
        Path,
        typer.Argument(click_type=LOCAL_PATH, help="Directory of the Flower app."),
    ],
    superlink: Annotated[
        str, typer.Argument(help="The SuperLink's name in Flower's config.toml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...", help="Changes of the app's run configuration."
        ),
    ] = None,
) -> None:
    """Run a Flower app on a SuperLink, and again where it was struck down.

    Where SuperLink or ServerApp are killed, Flower's run ends. This starts the next
    one, which goes on from the checkpoint in the app's output-dir. Stopping this stops
    the run.

    Example: `lola-flwr serve simulations/glue lan output-dir=/var/lib/lola-flwr/run`
    """
    from lola_flwr.cli.app_config import as_run_config, read_overrides
    from lola_flwr.deployment.serving import serve as run_to_the_end
    from lola_flwr.simulation.flower_app import read_app

    found = read_app(app)
    changes = read_overrides(found, overrides or [])
    config = {**found.config, **changes}
    if "output-dir" in config and not config["output-dir"]:
        raise UserError(
            "Where shall the run go on? Give output-dir=DIRECTORY, one for this run."
        )

    def echo(line: str) -> None:
        print(plain_line(line), flush=True)

    with terminable():
        finished = run_to_the_end(app, superlink, as_run_config(changes), echo)
    if not finished.completed:
        raise UserError(finished.error or f"the run is {finished.status}")
    print(finished.final or "completed")
