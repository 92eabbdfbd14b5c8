"""The command ``lola-flwr node``: read its words as Flower does, and serve."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from lola_flwr.deployment.node.inner import what_differs
from lola_flwr.errors import UserError

if TYPE_CHECKING:
    from flwr.supernode.cli.flower_supernode import SuperNodeLifespanConfig

FLOWERS_OWN = "flower-supernode"


def run(words: Sequence[str]) -> None:
    """Be a SuperNode, until a signal ends it.

    Where the installed Flower is another inside than this was written for, its own
    program is started with the same words in place of this process, and a line says so.

    Parameters
    ----------
    words
        Options as ``flower-supernode`` takes them.

    Raises
    ------
    UserError
        They ask for what only Flower's own program does.
    """
    difference = what_differs()
    if difference is not None:
        print(
            f"lola-flwr node: flwr {version('flwr')} is another one inside than this "
            f"knows ({difference}): {FLOWERS_OWN} runs in its place, slower.",
            file=sys.stderr,
            flush=True,
        )
        os.execvp(FLOWERS_OWN, [FLOWERS_OWN, *words])
    from flwr.supercore.grpc_health import run_health_server_grpc_no_tls
    from flwr.supernode.cli.flower_supernode import _parse_supernode_lifespan_config

    from lola_flwr.deployment.node.serve import serve

    # Flower's parser reads the words of the process, and names it in its help.
    sys.argv = ["lola-flwr node", *words]
    options = _parse_supernode_lifespan_config()
    _check(options)
    options.server_address = _address(options.server_address)
    health = None
    if options.health_server_address is not None:
        health = run_health_server_grpc_no_tls(options.health_server_address)
    try:
        serve(options)
    finally:
        if health is not None:
            health.stop(None)


def _check(options: SuperNodeLifespanConfig) -> None:
    if options.isolation != "subprocess":
        raise UserError(
            f"--isolation {options.isolation}: `lola-flwr node` runs ClientApps in its "
            f"own process; start {FLOWERS_OWN} for it."
        )
    if options.runtime_dependency_install:
        raise UserError(
            "--allow-runtime-dependency-installation: `lola-flwr node` runs ClientApps "
            "in its own environment; install what they need there, or start "
            f"{FLOWERS_OWN}."
        )
    if options.insecure and options.authentication_keys is not None:
        raise UserError(
            "--auth-supernode-private-key needs TLS: leave --insecure out, and name "
            "the authority with --root-certificates."
        )


def _address(superlink: str) -> str:
    from flwr.supercore.address import parse_address

    parsed = parse_address(superlink)
    if not parsed:
        raise UserError(f"--superlink {superlink}: write host:port.")
    host, port, is_v6 = parsed
    return f"[{host}]:{port}" if is_v6 else f"{host}:{port}"
