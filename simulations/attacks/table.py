"""What came of the attacks, in a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from simulations.attacks.attack import ABSENT, HONEST
from simulations.figures.tables import Row


def attack_rows(runs: Sequence[Row]) -> list[Row]:
    """Return one row for each attack, share, split and codec: means over seeds.

    Parameters
    ----------
    runs
        One row a run, with all fields of an `Outcome`. What is lost is lost against the
        run of the same seed without attack, and against that without these devices:
        nothing gives their data back.
    """
    rows: list[Row] = []
    honest, absent = (
        {_place(run): float(run["accuracy"]) for run in runs if run["attack"] == name}
        for name in (HONEST, ABSENT)
    )
    places = dict.fromkeys(
        (r["attack"], r["share"], r["split"], r["codec"]) for r in runs
    )
    for place in places:
        some = [
            r
            for r in runs
            if (r["attack"], r["share"], r["split"], r["codec"]) == place
        ]
        costs = [
            honest.get((0.0, *_place(r)[1:]), math.nan) - float(r["accuracy"])
            for r in some
        ]
        beyond_data = [
            absent.get(_place(r), math.nan) - float(r["accuracy"]) for r in some
        ]
        attack, share, split, codec = place
        rows.append(
            {
                "attack": attack,
                "share": f"{float(share):.0%}",
                "split": split,
                "codec": codec,
                "accuracy": round(_mean(r["accuracy"] for r in some), 3),
                "points lost": round(100 * _mean(costs), 1),
                "than without them": round(100 * _mean(beyond_data), 1),
                "backdoor": f"{_mean(r['backdoor'] for r in some):.0%}",
                "honest refused": f"{_mean(r['honest_refused'] for r in some):.1%}",
                "honest distrusted": round(
                    _mean(r["honest_distrusted"] for r in some), 1
                ),
                "hostile found": f"{_mean(r['found'] for r in some):.0%}",
                "after rounds": _median(r["found_after"] for r in some),
            }
        )
    return rows


def _place(run: Row) -> tuple[object, ...]:
    return run["share"], run["split"], run["codec"], run["seed"]


def _mean(values: Iterable[object]) -> float:
    known = [float(str(value)) for value in values]
    return float(np.nanmean(known)) if np.isfinite(known).any() else math.nan


def _median(values: Iterable[object]) -> str:
    known = [float(str(value)) for value in values if value is not None]
    return f"{np.median(known):.0f}" if known else "-"
