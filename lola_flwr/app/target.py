"""How a run ends at its target, and what it says of it in the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lola_flwr.errors import UserError
from lola_flwr.report.tally import Tally
from lola_flwr.run.records import Record
from lola_flwr.run.target import Target, reached


class TargetReached(Exception):
    """Ends Flower's rounds, which know no other end than their number."""


def check_target(
    target: Target | None, server_round: int, metrics: Mapping[str, float]
) -> None:
    """Refuse a target that there is no run for.

    Parameters
    ----------
    target
        The target, if there is one.
    server_round
        Round that was evaluated; 0 before the first.
    metrics
        The evaluation.

    Raises
    ------
    UserError
        The evaluation has no such metric, or the model is there before any round.
    """
    if target is None:
        return
    target.require_in(metrics)
    if not server_round and target.holds(metrics):
        raise UserError(
            f"target={str(target)!r} holds before the first round: "
            f"{target.metric} is {metrics[target.metric]:.4g}. Set another."
        )


def was_reached(target: Target | None, rounds: Iterable[Record]) -> bool:
    """Tell whether rounds that are done have reached a target."""
    return target is not None and any(target.holds(r.metrics) for r in rounds)


def spent_words(target: Target | None, rounds: Iterable[Record]) -> str:
    """Say in the final line's way what a target took; nothing without one."""
    if target is None:
        return ""
    spent = reached(Tally.of(rounds).course(target.metric), target)
    if spent is None:
        return " target_round=none"
    words = f" target_round={spent.server_round} target_s={spent.wireless_s:.3f}"
    for name, count in (("up", spent.up_bytes), ("down", spent.down_bytes)):
        words += "" if count is None else f" target_{name}_mb={count / 1e6:.3f}"
    return words + ("" if spent.joules is None else f" target_j={spent.joules:.3f}")
