"""``lola-flwr node``: a SuperNode that stays."""

from __future__ import annotations

import typer

# Every word but --help is Flower's to read.
SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True}


def node(context: typer.Context) -> None:
    """Be a SuperNode that looks for messages often and runs apps in this process.

    Takes any Flower app, and the options of `flower-supernode`, which
    `flower-supernode --help` lists.

    Example: `lola-flwr node --superlink superlink.lan:8000 --root-certificates ca.crt
    --node-config 'partition-id=0 num-partitions=2'`
    """
    from lola_flwr.deployment.node.command import run

    run(context.args)
