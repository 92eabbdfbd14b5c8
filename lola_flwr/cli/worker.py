"""``lola-flwr worker``: the resident worker of a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lola_flwr.cli.paths import LOCAL_PATH
from lola_flwr.errors import UserError


def worker(
    socket: Annotated[
        Path, typer.Option(click_type=LOCAL_PATH, help="Unix socket to listen at.")
    ],
    superlink: Annotated[
        str | None, typer.Option(help="SuperLink, host:port; for a limit.")
    ] = None,
    relay: Annotated[
        str | None,
        typer.Option(help="Pace uploads in a relay that listens here, host:port."),
    ] = None,
    tc: Annotated[
        str | None, typer.Option(help="Limit uploads with tc on this interface.")
    ] = None,
    hold_s: Annotated[
        float, typer.Option(min=0, help="Seconds that a silent run keeps the device.")
    ] = 120.0,
    exit_with_supernode: Annotated[
        bool, typer.Option(help="End when the SuperNode is gone.")
    ] = False,
    status: Annotated[bool, typer.Option(help="Ask the running worker.")] = False,
    stop: Annotated[bool, typer.Option(help="Stop the running worker.")] = False,
) -> None:
    """Run the worker that keeps this device's model from message to message.

    The SuperNode names it: `--node-config 'worker="/run/lola-flwr/worker.sock"'`. With
    `--relay` the SuperNode connects to the relay in place of the SuperLink.

    Example: `lola-flwr worker --socket /run/lola-flwr/worker.sock
    --superlink superlink.lan:8000 --relay 127.0.0.1:9095`
    """
    from lola_flwr.deployment.serve_worker import start_worker, uplink_limit
    from lola_flwr.deployment.worker import ask_worker
    from lola_flwr.deployment.worker_link import LinkError

    try:
        if status or stop:
            for key, value in ask_worker(socket, "stop" if stop else "status").items():
                print(f"{key}: {value}")
            return
        start_worker(
            socket,
            uplink_limit(superlink, relay, tc),
            hold_s=hold_s,
            exit_with_supernode=exit_with_supernode,
        )
    except LinkError as error:
        raise UserError(str(error)) from None
