"""Marks for parameters."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import pytest


def rest_slow(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """Return parameters of which all but the first few are slow.

    Parameters
    ----------
    values
        The parameters; tuples where there are several names.
    fast
        How many of them the fast suite runs.
    """
    rest = iter(values)
    first = list(islice(rest, fast))
    return first + [
        pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow)
        for v in rest
    ]
