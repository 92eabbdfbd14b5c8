"""Run a worker: ``python -m lola_flwr.deployment.serve_worker --socket PATH``.

Needs numpy and what the app needs: no flwr, and no library for command lines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lola_flwr.deployment.pacing import PacedRelay
from lola_flwr.deployment.shaping import TrafficControl
from lola_flwr.deployment.uplink import NoLimit, UplinkLimit
from lola_flwr.deployment.worker import Worker, ask_worker, run_worker
from lola_flwr.deployment.worker_link import LinkError
from lola_flwr.errors import UserError
from lola_flwr.machine.files import local_path


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(
        prog="lola-flwr worker", description=(__doc__ or "").splitlines()[0]
    )
    add = options.add_argument
    add("--socket", type=local_path, required=True, help="where to listen")
    add("--superlink", help="address of the SuperLink, host:port, for a limit")
    add("--relay", help="pace uploads in a relay that listens here: 127.0.0.1:9095")
    add("--tc", metavar="INTERFACE", help="limit uploads with tc on this interface")
    add("--hold-s", type=float, default=120.0, help="a silent run's hold, seconds")
    add("--exit-with-supernode", action="store_true", help="end when it is gone")
    what = options.add_mutually_exclusive_group()
    what.add_argument("--status", action="store_true", help="ask the running worker")
    what.add_argument("--stop", action="store_true", help="stop the running worker")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, ask or stop a worker; return the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.status or options.stop:
            asked = ask_worker(options.socket, "stop" if options.stop else "status")
            print(*(f"{key}: {value}" for key, value in asked.items()), sep="\n")
            return 0
        start_worker(
            options.socket,
            uplink_limit(options.superlink, options.relay, options.tc),
            hold_s=options.hold_s,
            exit_with_supernode=options.exit_with_supernode,
        )
    except (UserError, LinkError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def start_worker(
    socket_path: Path, uplink: UplinkLimit, *, hold_s: float, exit_with_supernode: bool
) -> None:
    """Serve until a signal, and take the limit away however that ends."""
    try:
        worker = Worker(
            socket_path,
            uplink=uplink,
            hold_s=hold_s,
            exit_with_supernode=exit_with_supernode,
        )
    except BaseException:
        uplink.close()
        raise
    run_worker(worker)


def uplink_limit(
    superlink: str | None, relay: str | None, interface: str | None
) -> UplinkLimit:
    """Return what the options of a worker choose to limit uploads with.

    Raises
    ------
    UserError
        The options do not go together.
    """
    if relay is None and interface is None:
        return NoLimit()
    if superlink is None:
        raise UserError("A limit needs the SuperLink's address: --superlink host:port.")
    if relay is not None and interface is not None:
        raise UserError("Choose one limit: --relay or --tc.")
    if relay is not None:
        return PacedRelay(relay, superlink)
    assert interface is not None
    return TrafficControl(interface, superlink)


if __name__ == "__main__":
    sys.exit(main())
