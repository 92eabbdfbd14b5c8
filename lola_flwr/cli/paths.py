"""What commands take for a path."""

from __future__ import annotations

import os
from typing import Any

import click

from lola_flwr.machine.files import expanded


class LocalPath(click.Path):
    """A path on this host; ``~`` is the home directory, after ``--out=`` as well."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Write ``~`` out, then check as click does."""
        return super().convert(expanded(os.fspath(value)), param, ctx)


LOCAL_PATH = LocalPath()
