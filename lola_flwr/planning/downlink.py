"""How long devices take to have the model, before they can begin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lola_flwr.allocation import AllocationProblem, Broadcast
from lola_flwr.arrays import Float64Array
from lola_flwr.planning.known import Known, RunStatement
from lola_flwr.planning.round_problem import RoundProblem
from lola_flwr.system.channel import rates_down_bps

# Numbers of receivers of a broadcast that blocks are chosen for.
_MOST_TRIED = 8


def received(run: RunStatement, known: Known, stated: RoundProblem) -> RoundProblem:
    """Let devices begin when they have their message.

    How long that takes is what was observed; of devices not seen yet, as on a simulated
    channel, what it is by the channel's model.
    """
    downlink_s, broadcast = stated.downlink_s, None
    mode, bits = run.channel.downlink_channel.mode, known.downlink_bits
    if mode != "free" and bits is not None:
        rate_bps = rates_down_bps(stated.profiles, run.channel, known.moment(run))
        seen = known.downlinks.are_known(known.names)
        if mode == "broadcast":
            broadcast = Broadcast(bits, np.where(seen, np.inf, rate_bps))
        else:
            parts = _most_active(run, stated.problem)
            downlink_s = np.where(seen, downlink_s, bits * parts / rate_bps)
    compute_s = stated.problem.compute_s + downlink_s[:, None]
    return replace(
        stated,
        problem=replace(stated.problem, compute_s=compute_s),
        downlink_s=downlink_s,
        broadcast=broadcast,
    )


def _most_active(run: RunStatement, problem: AllocationProblem) -> int:
    """Return how many devices a round may have at most."""
    if run.allocation.sharing_eps > 0:
        return problem.num_devices
    most = problem.num_active + problem.mode.backups
    return min(most, problem.num_devices)


def alone_s(broadcast: Broadcast | None) -> Float64Array | None:
    """Return how long a broadcast to each device alone takes, [K]; None without."""
    return None if broadcast is None else broadcast.bits / broadcast.rate_bps


def heard_by_some(
    problem: AllocationProblem, broadcast: Broadcast | None
) -> list[AllocationProblem]:
    """Return problems in which a broadcast reaches few or many, before one is solved.

    Who is to hear it depends on the blocks, and those on who hears: some numbers of
    receivers are tried, the quickest ones of each. Without a broadcast there is one
    problem.
    """
    able = np.asarray(problem.feasible.any(axis=1))
    own_s = alone_s(broadcast)
    if broadcast is None or own_s is None or not able.any():
        return [problem]
    waits_s = np.unique(own_s[able])
    tried = np.linspace(0, waits_s.size - 1, _MOST_TRIED).round().astype(int)
    problems = []
    for longest_s in waits_s[np.unique(tried)]:
        hears = able & (own_s <= longest_s)
        problems.append(broadcast.waiting(problem, broadcast.wait_s(hears), hears))
    return problems
