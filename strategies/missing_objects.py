"""Ask soon again for what a device has announced and is still sending.

Flower's Grid asks again after 1, 2, 4, ... 10 s, so that a reply is taken up to ten
seconds after its last byte. The pauses are defaults of a function that no setting of
the Grid reaches.
"""

from __future__ import annotations

import inspect
from functools import partial
from logging import WARNING

from flwr.supercore import log

_PAUSES = {"initial_backoff": 0.1, "backoff_cap": 0.5, "max_tries_per_object": None}


def ask_soon_again() -> None:
    """Let the Grids of this process ask every 0.1 to 0.5 s, for as long as before.

    Where the installed Flower has no such function it stays as it is, and the log says
    so.
    """
    from flwr.superlink.grid import http_grid  # only where there is such a Grid

    function = getattr(http_grid, "pull_objects", None)
    if isinstance(function, partial):
        return
    if function is None or not {*_PAUSES} <= {*inspect.signature(function).parameters}:
        log(
            WARNING,
            "This Flower fetches replies in another way: large ones are taken up to "
            "10 s after their last byte.",
        )
        return
    # Flower does not call it the module's own.
    http_grid.pull_objects = partial(function, **_PAUSES)  # type: ignore[attr-defined]
