"""Plan rounds for a fleet without a model, Flower or torch, under any allocators."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lola_flwr.allocation import (
    ALLOCATORS,
    RANDOM_ALLOCATORS,
    Allocation,
    AllocationProblem,
    RoundMode,
    allocate,
)
from lola_flwr.costs.estimated import BlockCosts, estimate_costs
from lola_flwr.costs.shapes import model_shapes
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.run.records import BlockRecord, RoundRecord
from lola_flwr.system.channel import uplink_rates_bps
from lola_flwr.system.devices import DeviceProfile


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
    """

    allocator: str
    allocation: Allocation
    solve_s: float


def named_model_costs(
    model: str, *, batch_size: int = 32, sequence_length: int = 64, codec: str = "fp32"
) -> BlockCosts:
    """Estimate what each layer of a model costs, from its name or ``config.json``.

    Parameters
    ----------
    model
        As for `model_shapes`.
    batch_size, sequence_length
        Mini-batch of a device: examples, and tokens of each.
    codec
        Name of the codec that gradients travel in.

    Raises
    ------
    UserError
        Unknown model or codec.
    """
    known = model_shapes(model)
    return estimate_costs(
        known.shapes,
        partition_parameters(known.shapes),
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
    fading: bool = True,
    mode: RoundMode | None = None,
) -> AllocationProblem:
    """State a round's allocation problem for a fleet.

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
        Whether the channel fades (Rayleigh), or every device has its mean SNR.
    mode
        Which blocks need how many devices (default: every block one).
    """
    rate_bps = uplink_rates_bps(
        fleet,
        bandwidth_hz=bandwidth_hz,
        server_round=server_round,
        seed=seed,
        fading=fading,
    )
    speed = np.array([device.flops_per_s for device in fleet])
    memory_bytes = np.array([device.memory_bytes for device in fleet])
    required_bytes = costs.required_bytes(fleet)  # [K, N]
    return AllocationProblem(
        costs.flops[None, :] / speed[:, None],  # [K, N]
        costs.payload_bits[None, :] / rate_bps[:, None],
        required_bytes <= memory_bytes[:, None],
        memory_bytes=memory_bytes,
        required_memory_bytes=required_bytes.min(axis=0),
        device_names=[device.name for device in fleet],
        mode=RoundMode() if mode is None else mode,
    )


def compare(
    problem: AllocationProblem,
    allocators: Sequence[str] = tuple(ALLOCATORS),
    *,
    seed: int = 0,
) -> list[Plan]:
    """Solve one problem under several allocators.

    Parameters
    ----------
    problem
        The instance.
    allocators
        Names as for `allocate`.
    seed
        Seed of the random ones.

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
    for name in allocators:
        options: dict[str, Any] = {"seed": seed} if name in RANDOM_ALLOCATORS else {}
        start = time.perf_counter()
        allocation = allocate(problem, name, **options)
        plans.append(Plan(name, allocation, time.perf_counter() - start))
    return plans


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
    records: list[RoundRecord] = []
    wireless_s = 0.0
    for server_round in range(1, rounds + 1):
        problem = round_problem(
            fleet,
            costs,
            bandwidth_hz=bandwidth_hz,
            server_round=server_round,
            seed=seed,
            mode=mode,
        )
        (plan,) = compare(problem, [allocator], seed=seed + server_round)
        wireless_s += plan.allocation.round_s
        records.append(
            RoundRecord(
                server_round=server_round,
                num_devices=problem.num_devices,
                wireless_s=wireless_s,
                round_s=plan.allocation.round_s,
                observed_s=plan.allocation.round_s,
                bound_s=plan.allocation.bound_s,
                blocks=planned_blocks(problem, plan.allocation, fleet, costs),
                measured_strategy_s=plan.solve_s,
            )
        )
    return records


def planned_blocks(
    problem: AllocationProblem,
    allocation: Allocation,
    fleet: Sequence[DeviceProfile],
    costs: BlockCosts,
) -> tuple[BlockRecord, ...]:
    """Return each active device's part of a plan, from the first block on."""
    upload_s = allocation.upload_s(problem)
    required_bytes = costs.required_bytes(fleet)  # [K, N]
    parts = [
        BlockRecord(
            block_index=block,
            depth=problem.num_blocks - block,
            device=fleet[row].name,
            share=float(allocation.share[row]),
            compute_s=float(problem.compute_s[row, block]),
            upload_s=float(upload_s[row]),
            reported_compute_s=None,
            compute_clock="",
            loss=None,
            status="planned",
            payload_bytes=int(costs.payload_bits[block]) // 8,
            required_memory_bytes=float(required_bytes[row, block]),
            memory_bytes=fleet[row].memory_bytes,
        )
        for row, block in enumerate(allocation.block_of_device.tolist())
        if block >= 0
    ]
    return tuple(sorted(parts, key=lambda part: (part.block_index, part.device)))
