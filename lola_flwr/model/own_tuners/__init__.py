"""Tunings that peft lacks, as tuners of peft: one module each, found by their files.

A module defines a configuration, a layer, and calls ``register`` of ``on_peft``. From
then on the tuning is asked for by its name, as any of peft's; what is here needs peft
when it is called, not before.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

_SHARED = "on_peft"

OWN_TUNERS = tuple(sorted({m.name for m in iter_modules(__path__)} - {_SHARED}))
"""Names of the tunings that are here."""


def register_own_tuners() -> None:
    """Make peft know the tunings of this package; needs peft."""
    for name in OWN_TUNERS:
        import_module(f"{__name__}.{name}")
