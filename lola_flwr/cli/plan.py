"""``lola-flwr plan``: who gets which block and share, and what that comes to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lola_flwr.cli.console import bars, console, print_json, table
from lola_flwr.cli.fleet import fleet_of
from lola_flwr.cli.forecast import Likely, likely
from lola_flwr.cli.paths import LOCAL_PATH
from lola_flwr.errors import UserError, si

if TYPE_CHECKING:
    from lola_flwr.allocation import AllocationProblem
    from lola_flwr.planning import Plan
    from lola_flwr.run.records import BlockRecord
    from lola_flwr.system.channel import Channel


def plan(
    fleet: Annotated[
        Path | None,
        typer.Option(
            click_type=LOCAL_PATH,
            help="Fleet file, or presets: jetson-nano:4,raspberry-pi-5:8 (default: a "
            "generated fleet).",
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="Devices to generate; 20 if not given.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="minilm-l6, roberta-base, ..., or a model's directory.")
    ] = "roberta-base",
    stack: Annotated[
        str | None, typer.Option(help="Layers that are the blocks: encoder.block, ...")
    ] = None,
    allocator: Annotated[
        str, typer.Option(help="Allocator whose plan is shown in full.")
    ] = "exact",
    bandwidth_hz: Annotated[float, typer.Option(help="Total uplink band, Hz.")] = 20e6,
    batch_size: Annotated[
        str, typer.Option(help="Examples of a batch; auto: each device its own.")
    ] = "32",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens an example.")] = 64,
    codec: Annotated[str, typer.Option(help="Codec of the gradients.")] = "fp32",
    server_round: Annotated[
        int, typer.Option("--round", min=1, help="Round of the channel's draw.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of fleet and channel.")] = 0,
    channel: Annotated[
        str,
        typer.Option(help="Links' rates: package.module:function, or traces *.csv."),
    ] = "",
    uplink: Annotated[
        str, typer.Option(help="ofdma, power-limited, or tdma.")
    ] = "ofdma",
    fading: Annotated[
        str, typer.Option(help="rayleigh, none, or gauss-markov.")
    ] = "rayleigh",
    coherence_s: Annotated[
        float, typer.Option(help="Coherence time of gauss-markov fading.")
    ] = 1.0,
    mobility: Annotated[
        str, typer.Option(help="Moving devices: 'speed_m_s=1.4, cell_m=500'.")
    ] = "",
    energy_slack: Annotated[
        float, typer.Option(min=0, help="Latency given up for less energy, relative.")
    ] = 0.1,
    like: Annotated[
        list[Path] | None,
        typer.Option(
            click_type=LOCAL_PATH,
            help="Finished run that tells how many rounds a target takes; of several "
            "seeds: several times.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="What --like is to forecast [default: the run's own]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan one round: a block and a share of the uplink for every device.

    Shows the plan of one allocator, and all allocators side by side.

    Example: `lola-flwr plan --devices 20`

    Another: `lola-flwr plan --fleet fleet.toml --model minilm-l6 --allocator jbba`

    Another: `lola-flwr plan --fleet jetson-orin-nano:4,raspberry-pi-5:8`

    Until a target: `lola-flwr plan --model minilm-l6 --like runs/NAME`
    """
    if fleet is not None and devices is not None:
        raise UserError("--devices generates a fleet and --fleet reads one; drop one.")
    if codec == "auto":
        raise UserError(
            "--codec=auto chooses for each device as a run goes on; plan with one, "
            "such as bf16."
        )
    if target and not like:
        raise UserError(f"--target={target} needs a run that got there: --like runs/X.")
    largest, batch_sizes = _batches(batch_size, allocator)
    there = fleet_of(fleet, 20 if devices is None else devices, seed)

    from lola_flwr.allocation import find_allocator
    from lola_flwr.planning import (
        AllocationOptions,
        Known,
        Plan,
        RunStatement,
        comparable,
        compare,
        matching_seed,
        named_model_costs,
        planned_blocks,
        solve_round,
    )

    find_allocator(allocator)
    costs = named_model_costs(
        model,
        batch_size=largest,
        sequence_length=max_length,
        codec=codec,
        stack=stack,
    )
    run = RunStatement(
        costs=costs,
        channel=_channel(
            bandwidth_hz,
            uplink=uplink,
            fading=fading,
            coherence_s=coherence_s,
            mobility=mobility,
            own=channel,
        ),
        allocation=AllocationOptions(
            allocator=allocator, batch_sizes=batch_sizes, energy_slack=energy_slack
        ),
        seed=seed,
    )
    by_name = sorted(there, key=lambda device: device.name)
    start = time.perf_counter()
    solved = solve_round(run, Known.at_first(run, by_name, server_round))
    solve_s = time.perf_counter() - start
    parts = planned_blocks(run, solved)
    problem = solved.stated.problem
    if batch_sizes:
        # Another allocator's round would have other batches.
        joules = [part.joules for part in parts]
        plans = [Plan(allocator, solved.allocation, solve_s, joules)]
    else:
        plans = compare(
            problem,
            list(dict.fromkeys([allocator, *comparable(problem)])),
            seed=matching_seed(seed, server_round),
            energy_slack=energy_slack,
        )
    settings = {"model": model, "stack": stack or "", "batch-size": largest}
    settings["max-length"] = max_length
    told = likely(run, by_name, like, target, settings) if like else None
    if as_json:
        print_json(_as_json(problem, plans, parts, model, told))
    else:
        _print(problem, plans, parts, model)
        _print_likely(told)


def _channel(
    bandwidth_hz: float,
    *,
    uplink: str,
    fading: str,
    coherence_s: float,
    mobility: str,
    own: str,
) -> Channel:
    """Read what the devices share."""
    from lola_flwr.run.config import keyword_arguments
    from lola_flwr.system.channel import Channel
    from lola_flwr.system.mobility import mobility_of
    from lola_flwr.system.own_channel import find_channel

    if not 0 < bandwidth_hz < float("inf"):
        raise UserError(
            f"--bandwidth-hz={bandwidth_hz:g} must be a positive number of hertz, such "
            "as 20e6."
        )
    return Channel(
        bandwidth_hz=bandwidth_hz,
        uplink=cast(Any, uplink),  # the channel checks it
        fading=cast(Any, fading),
        coherence_s=coherence_s,
        mobility=mobility_of(keyword_arguments(mobility)),
        own_rates=find_channel(own),
    )


def _batches(text: str, allocator: str) -> tuple[int, tuple[int, ...]]:
    """Read the batch: the largest that there may be, and those to choose from."""
    from lola_flwr.allocation import ENERGY_ALLOCATORS
    from lola_flwr.planning import BATCH_SIZES

    if text == "auto" and allocator in ENERGY_ALLOCATORS:
        raise UserError(
            f"--batch-size=auto chooses for time, and --allocator={allocator} for "
            "energy; give a --batch-size."
        )
    if text == "auto":
        return max(BATCH_SIZES), BATCH_SIZES
    if text.isdecimal() and int(text) >= 1:
        return int(text), ()
    raise UserError(f"--batch-size={text} must be a whole number, at least 1, or auto.")


def _as_json(
    problem: AllocationProblem,
    plans: Sequence[Plan],
    parts: Sequence[BlockRecord],
    model: str,
    told: Likely | None,
) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if abs(value) < float("inf") else None

    return {
        "model": model,
        "num_devices": problem.num_devices,
        "num_blocks": problem.num_blocks,
        "allocator": plans[0].allocator,
        "round_s": finite(plans[0].allocation.round_s),
        "blocks": [
            {
                "block": part.block_index,
                "further_blocks": list(part.further_blocks),
                "depth": part.depth,
                "device": part.device,
                "share": part.share,
                "compute_s": part.compute_s,
                "upload_s": part.upload_s,
                "total_s": part.latency_s,
                "payload_bits": 8.0 * part.payload_bytes,
                "required_memory_bytes": part.required_memory_bytes,
                "memory_bytes": part.memory_bytes,
                **_known(batch_size=part.batch_size, joules=part.joules),
                **({"turn_s": part.turn_s} if problem.in_turn else {}),
            }
            for part in parts
        ],
        "allocators": [
            {
                "allocator": plan.allocator,
                "round_s": finite(plan.allocation.round_s),
                "bound_s": finite(plan.allocation.bound_s),
                "solve_s": plan.solve_s,
                **_known(joules=plan.total_j, worst_device_j=plan.worst_j),
            }
            for plan in plans
        ],
        **({} if told is None else {"forecast": told.to_values()}),
    }


def _print_likely(told: Likely | None) -> None:
    if told is not None:
        console().print(f"\n{told.line()}")


def _known(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _print(
    problem: AllocationProblem,
    plans: Sequence[Plan],
    parts: Sequence[BlockRecord],
    model: str,
) -> None:
    shown = plans[0]
    round_s = shown.allocation.round_s
    rows = table(
        f"{model}: {len(parts)} of {problem.num_devices} devices train "
        f"{problem.num_blocks} blocks in {round_s:.3f} s ({shown.allocator})",
        *("device", "block", "depth", "share", "compute", "upload", "memory"),
    )
    chosen = any(part.batch_size is not None for part in parts)
    if chosen:
        rows.add_column("batch", justify="right")
    tells_energy = all(part.joules is not None for part in parts)
    if tells_energy:
        rows.add_column("energy", justify="right")
    rows.add_column("▒ compute  █ upload", justify="left")
    for part in parts:
        rows.add_row(
            part.device,
            part.numbers,
            str(part.depth),
            f"{part.share:.2%}",
            f"{part.compute_s:.2f} s",
            f"{part.upload_s:.2f} s",
            f"{si(part.required_memory_bytes or 0, 'B')} of "
            f"{si(part.memory_bytes or 0, 'B')}",
            *[str(part.batch_size)] * chosen,
            *[si(part.joules or 0, "J")] * tells_energy,
            bars(part.compute_s, part.upload_s, round_s, turn_s=part.turn_s),
        )
    if chosen:
        console().print(rows)
        return
    best_s = min(plan.allocation.round_s for plan in plans)
    columns = ["allocator", "latency", "above best", "solved in"]
    columns[3:3] = ["energy", "worst device"] * tells_energy
    side = table("\nAllocators", *columns)
    # Which of two that come to the same round is the first, rounding must not decide.
    beside_best = {p.allocator: round(p.allocation.round_s / best_s, 9) for p in plans}
    for plan in sorted(plans, key=lambda p: (beside_best[p.allocator], p.allocator)):
        allocation = plan.allocation
        side.add_row(
            plan.allocator,
            f"{allocation.round_s:.3f} s",
            f"{allocation.round_s / best_s - 1:.1%}",
            *[si(j or 0, "J") for j in (plan.total_j, plan.worst_j)] * tells_energy,
            f"{1e3 * plan.solve_s:.1f} ms",
        )
    out = console()
    out.print(rows)
    out.print(side)
