"""Plan rounds for a fleet without a model, under any allocators."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lola_flwr.allocation import (
    ALLOCATORS,
    ENERGY_ALLOCATORS,
    IN_TURN_ALLOCATORS,
    RANDOM_ALLOCATORS,
    UNIFORM_POWER_ALLOCATORS,
    Allocation,
    AllocationProblem,
    RoundMode,
    allocate,
)
from lola_flwr.costs.estimated import BlockCosts, estimate_costs
from lola_flwr.costs.shapes import config_file, model_shapes
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.planning.batches import solve_round
from lola_flwr.planning.known import AllocationOptions, Known, RunStatement
from lola_flwr.planning.solution import planned_blocks
from lola_flwr.planning.statement import stated_round
from lola_flwr.run.records import RoundRecord, added
from lola_flwr.system.channel import Channel
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.system.fading import Fading


@dataclass(frozen=True, eq=False)
class Plan:
    """One allocator's answer.

    Parameters
    ----------
    allocator
        Its name.
    allocation
        The answer.
    solve_s
        Seconds that it took here.
    joules
        Energy of each device; None where it is not known.
    """

    allocator: str
    allocation: Allocation
    solve_s: float
    joules: Sequence[float | None]

    @property
    def total_j(self) -> float | None:
        """Energy of the round, joules; None where it is not known."""
        return None if None in self.joules else sum(filter(None, self.joules))

    @property
    def worst_j(self) -> float | None:
        """Energy of the device that it takes most of, joules; None if not known."""
        known = [*filter(None, self.joules)]
        return None if None in self.joules else max(known, default=0.0)


def named_model_costs(
    model: str,
    *,
    batch_size: int = 32,
    sequence_length: int = 64,
    codec: str = "fp32",
    stack: str | None = None,
) -> BlockCosts:
    """Return what each layer of a model costs, by its name or ``config.json``.

    For a name it is estimated, without PyTorch; for a configuration counted as a run
    counts it, on a model without weights.

    Parameters
    ----------
    model
        A name as for `model_shapes`; or the directory or the ``config.json`` of any
        model of transformers.
    batch_size, sequence_length
        Mini-batch of a device: examples, and tokens of each.
    codec
        Name of the codec that gradients travel in.
    stack
        Where the blocks are not the layers of the longest stack: as for
        `partition_parameters`.

    Raises
    ------
    UserError
        Unknown model or codec, or a model whose costs cannot be counted.
    """
    if config_file(model) is not None:
        # PyTorch is imported where it has to be.
        from lola_flwr.costs.of_model import configured_model_costs

        return configured_model_costs(
            model,
            batch_size=batch_size,
            sequence_length=sequence_length,
            codec=codec,
            stack=stack,
        )
    known = model_shapes(model)
    return estimate_costs(
        known.shapes,
        partition_parameters(known.shapes, stack=stack),
        batch_size=batch_size,
        sequence_length=sequence_length,
        codec=codec,
        dropout_heads=known.dropout_heads,
    )


def round_problem(
    fleet: Sequence[DeviceProfile],
    costs: BlockCosts,
    *,
    bandwidth_hz: float = 20e6,
    server_round: int = 1,
    seed: int = 0,
    fading: Fading = "rayleigh",
    mode: RoundMode | None = None,
) -> AllocationProblem:
    """State a round's allocation problem for a fleet, as a run would at its start.

    Parameters
    ----------
    fleet
        The K devices.
    costs
        What each of the N blocks costs.
    bandwidth_hz
        Total uplink bandwidth.
    server_round, seed
        Round and seed of the channel's draw: the same as in a run with that seed.
    fading
        How links fade, as in `Channel`.
    mode
        Which blocks need how many devices (default: every block one).

    Returns
    -------
    The problem; its devices are those of the fleet, in this order, but for devices
    that can hold no block where all others take part.
    """
    run = RunStatement(
        costs=costs,
        channel=Channel(bandwidth_hz=bandwidth_hz, fading=fading),
        allocation=AllocationOptions(mode=RoundMode() if mode is None else mode),
        seed=seed,
    )
    return stated_round(run, Known.at_first(run, fleet, server_round)).problem


def compare(
    problem: AllocationProblem,
    allocators: Sequence[str] | None = None,
    *,
    seed: int = 0,
    energy_slack: float = AllocationOptions.energy_slack,
) -> list[Plan]:
    """Solve one problem under several allocators.

    Parameters
    ----------
    problem
        The instance.
    allocators
        Names as for `allocate` (default: all that know enough of the problem).
    seed
        Seed of the random ones.
    energy_slack
        Relative latency that those of energy may give up.

    Raises
    ------
    InfeasibleAllocation
        The problem has no solution.
    UserError
        Unknown allocator.
    """
    # What the solvers import when first called shall not count as their time.
    import scipy.optimize
    import scipy.sparse.csgraph  # noqa: F401

    plans = []
    for name in comparable(problem) if allocators is None else allocators:
        options: dict[str, Any] = {"seed": seed} if name in RANDOM_ALLOCATORS else {}
        if name in ENERGY_ALLOCATORS:
            options["slack"] = energy_slack
        start = time.perf_counter()
        allocation = allocate(problem, name, **options)
        seconds = time.perf_counter() - start
        joules = [None if math.isnan(j) else j for j in allocation.joules(problem)]
        plans.append(Plan(name, allocation, seconds, joules))
    return plans


def comparable(problem: AllocationProblem) -> tuple[str, ...]:
    """Return the names of the allocators that know enough of a problem."""
    names = [*ALLOCATORS]
    if problem.energy is not None and not problem.energy.unknown.any():
        names += ENERGY_ALLOCATORS
    if problem.in_turn:
        names = [name for name in names if name in IN_TURN_ALLOCATORS]
    if problem.power_limited is not None:
        names = [name for name in names if name not in UNIFORM_POWER_ALLOCATORS]
    return tuple(names)


def plan_rounds(
    fleet: Sequence[DeviceProfile],
    costs: BlockCosts,
    *,
    rounds: int,
    allocator: str = "exact",
    bandwidth_hz: float = 20e6,
    seed: int = 0,
    mode: RoundMode | None = None,
) -> list[RoundRecord]:
    """Plan a run's rounds, as its records: what it will take if profiles hold.

    Parameters
    ----------
    fleet, costs, bandwidth_hz, seed, mode
        As for `round_problem`; every round draws the channel anew.
    rounds
        How many rounds.
    allocator
        Name as for `allocate`.

    Returns
    -------
    Records without losses and metrics; each device's part has the status "planned".
    """
    run = RunStatement(
        costs=costs,
        channel=Channel(bandwidth_hz=bandwidth_hz),
        allocation=AllocationOptions(
            allocator=allocator, mode=RoundMode() if mode is None else mode
        ),
        seed=seed,
    )
    by_name = sorted(fleet, key=lambda device: device.name)
    records: list[RoundRecord] = []
    wireless_s = 0.0
    joules: float | None = 0.0
    for server_round in range(1, rounds + 1):
        start = time.perf_counter()
        known = Known.at_first(run, by_name, server_round, wireless_s)
        solved = solve_round(run, known)
        seconds = time.perf_counter() - start
        allocation = solved.allocation
        wireless_s += allocation.round_s
        record = RoundRecord(
            server_round=server_round,
            num_devices=solved.problem.num_devices,
            num_excluded=solved.num_excluded,
            wireless_s=wireless_s,
            round_s=allocation.round_s,
            observed_s=allocation.round_s,
            bound_s=allocation.bound_s,
            blocks=planned_blocks(run, solved),
            measured_strategy_s=seconds,
        )
        joules = added(joules, record.round_j)
        records.append(replace(record, joules=joules))
    return records
