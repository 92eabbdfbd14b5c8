"""Round latency of every allocator on the same random fleets and channels.

The setting is that of Fig. 5 of Wu, Chen, Huang, arXiv:2407.09873, as far as it is
public: RoBERTa-base, OFDMA uplink, Rayleigh block fading. The fleets' ranges of speed
and memory, the batch and the payload's precision are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from lola_flwr.allocation import (
    ALLOCATORS,
    RANDOM_ALLOCATORS,
    InfeasibleAllocation,
    RoundMode,
    allocate,
)
from lola_flwr.costs.estimated import BlockCosts, estimate_costs
from lola_flwr.costs.shapes import model_shapes
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.planning import (
    AllocationOptions,
    Known,
    RoundProblem,
    RunStatement,
    stated_round,
)
from lola_flwr.system.channel import Channel
from lola_flwr.system.devices import DeviceProfile, simulated_device
from simulations.figures.tables import Row

MODEL = "random:roberta-base"

# Every device trains and uploads the whole model. Its only freedom is the bandwidth:
# with one block, the greedy allocator's matching is everybody, at equal shares.
FULL_FINE_TUNING = {"fedavg-full": "greedy", "fedavg-full+shares": "exact"}
CONTENDERS = (*ALLOCATORS, *FULL_FINE_TUNING)


@dataclass(frozen=True)
class Setting:
    """What is the same in all draws of one point of a figure.

    Parameters
    ----------
    sequence_length
        Tokens of a sentence (CoLA: 64) or of a pair of sentences (MRPC: 128).
    num_devices
        Devices K of a fleet.
    bandwidth_hz
        Uplink band of the cell.
    transmit_snr_db
        Mean receive SNR of all devices, dB; None for the fleet's own, which differ.
    batch_size
        Sequences of a device's mini-batch.
    codec
        What gradients travel in.
    """

    sequence_length: int = 64
    num_devices: int = 20
    bandwidth_hz: float = 20e6
    transmit_snr_db: float | None = None
    batch_size: int = 16
    codec: str = "bf16"


@dataclass(frozen=True)
class Draw:
    """One fleet in one round: all that is random, whatever the setting."""

    fleet: int
    server_round: int


def draws(num_fleets: int, rounds: int) -> list[Draw]:
    """Return the draws of some fleets, each in as many rounds."""
    return [
        Draw(fleet, server_round)
        for fleet in range(num_fleets)
        for server_round in range(1, rounds + 1)
    ]


@lru_cache
def parameter_shapes(model_name: str) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of each parameter of a classifier with two labels."""
    shapes = model_shapes(model_name).shapes
    return {name: tuple(shape) for name, shape in shapes.items()}


@lru_cache
def block_costs(
    sequence_length: int, batch_size: int, codec: str = "fp32", *, merged: bool
) -> BlockCosts:
    """Return what each block of the model costs, or (merged) the whole of it."""
    shapes = parameter_shapes(MODEL)
    return estimate_costs(
        shapes,
        partition_parameters(shapes),
        batch_size=batch_size,
        sequence_length=sequence_length,
        codec=codec,
        merged=merged,
    )


def simulate(settings: Sequence[Setting], random_draws: Sequence[Draw]) -> list[Row]:
    """Run every contender on the same draws in every setting.

    Parameters
    ----------
    settings
        The points of a figure.
    random_draws
        Fleets and rounds, the same for every setting.

    Returns
    -------
    One row for each setting, draw and contender, with the round's latency and the
    number of devices excluded for want of memory. A draw in which the fleet cannot
    hold all blocks, or no device the whole model, is left out for all contenders.
    """
    return [
        row
        for setting in settings
        for draw in random_draws
        for row in _simulate_draw(setting, draw)
    ]


def _simulate_draw(setting: Setting, draw: Draw) -> list[Row]:
    rows: list[Row] = []
    try:
        for contender, excluded, round_s in _latencies(setting, draw):
            rows.append(
                {
                    "tokens": setting.sequence_length,
                    "devices": setting.num_devices,
                    "bandwidth_mhz": setting.bandwidth_hz / 1e6,
                    "transmit_snr_db": (
                        "fleet"
                        if setting.transmit_snr_db is None
                        else setting.transmit_snr_db
                    ),
                    "fleet": draw.fleet,
                    "round": draw.server_round,
                    "allocator": contender,
                    "excluded": excluded,
                    "round_s": round_s,
                }
            )
    except InfeasibleAllocation:
        return []
    return rows


def _latencies(setting: Setting, draw: Draw) -> Iterator[tuple[str, int, float]]:
    """Yield each contender's name, excluded devices and latency."""
    problem = stated_draw(setting, draw, merged=False).problem
    for name in ALLOCATORS:
        # A matching of its own for each draw, and yet the same in every run and for
        # all allocators that draw one.
        options: dict[str, Any] = (
            {"seed": 1000 * draw.fleet + draw.server_round}
            if name in RANDOM_ALLOCATORS
            else {}
        )
        yield name, 0, allocate(problem, name, **options).round_s
    whole = stated_draw(setting, draw, merged=True)
    excluded = setting.num_devices - len(whole.profiles)
    for name, allocator in FULL_FINE_TUNING.items():
        yield name, excluded, allocate(whole.problem, allocator).round_s


def stated_draw(setting: Setting, draw: Draw, *, merged: bool) -> RoundProblem:
    """State the problem of one draw, block by block or (merged) of full fine-tuning.

    Nobody is left out for being slow; under full fine-tuning those are that cannot hold
    the whole model, as all others take part.
    """
    run = RunStatement(
        costs=block_costs(
            setting.sequence_length, setting.batch_size, setting.codec, merged=merged
        ),
        channel=Channel(bandwidth_hz=setting.bandwidth_hz),
        allocation=AllocationOptions(
            mode=RoundMode(participation="all" if merged else "needed"),
            longest_round_s=math.inf,
        ),
        seed=draw.fleet,
    )
    fleet = draw_fleet(draw.fleet, setting.num_devices)
    if setting.transmit_snr_db is not None:
        # The fading of a draw is the same at every mean SNR.
        fleet = tuple(replace(d, snr_db=setting.transmit_snr_db) for d in fleet)
    return stated_round(run, Known.at_first(run, fleet, draw.server_round))


@lru_cache(maxsize=1000)
def draw_fleet(fleet: int, num_devices: int) -> tuple[DeviceProfile, ...]:
    """Return a fleet; a larger one of the same number begins with the same devices."""
    return tuple(simulated_device(index, seed=fleet) for index in range(num_devices))
