"""What would end a run in its first round, said before anything has started.

What takes no PyTorch is looked at first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from lola_flwr.allocation import AllocationProblem, RoundMode, allocate
from lola_flwr.app.config import AppConfig, LolaDeftConfig, UpdatesConfig
from lola_flwr.app.profiles import configured, simulated_profile
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.costs.shapes import ModelShapes
from lola_flwr.errors import UserError, si
from lola_flwr.machine.installation import require_extra
from lola_flwr.model.bases import LADDER, QUANTISED
from lola_flwr.model.blocks import BlockPartition, partition_parameters
from lola_flwr.model.sources import INSTEAD, check_source
from lola_flwr.server.selection import NEEDS_RESPONSE
from lola_flwr.system.devices import DeviceProfile

_FLOAT32_BYTES = 4


def check_model(
    config: AppConfig, known: Collection[str] = (), instead: str = INSTEAD
) -> None:
    """Check that the model is where its name says, and that adapters can be made.

    Parameters
    ----------
    config
        Run configuration.
    known
        Models that the app makes itself.
    instead
        What models there are without a network, for the message.
    """
    if config.model not in known:
        check_source(config.model, instead)
    if config.tuning not in ("full", LADDER):
        require_extra("adapters", "peft", f"tuning={config.tuning!r}")
    if config.base in QUANTISED:
        require_extra("quantised", "bitsandbytes", f"base={config.base!r}")


def fleet_of(config: AppConfig, num_devices: int) -> list[DeviceProfile]:
    """Return what the simulated devices offer."""
    return [
        configured(simulated_profile(config, index), config, index)
        for index in range(num_devices)
    ]


def check_shapes(
    config: AppConfig, shapes: ModelShapes, profiles: Sequence[DeviceProfile]
) -> None:
    """Check what a model's shapes tell of a run."""
    if config.pruned is None:  # else devices hold less, which the model itself tells
        check_weights(shapes, profiles)
    if isinstance(config, LolaDeftConfig):
        check_numbers(config, shapes, profiles)


def check_weights(shapes: ModelShapes, profiles: Sequence[DeviceProfile]) -> None:
    """Refuse devices none of which has room for the weights, whatever is trained."""
    needed = _FLOAT32_BYTES * sum(map(math.prod, shapes.shapes.values()))
    if any(p.streams_prefix or p.memory_bytes >= needed for p in profiles):
        return
    largest = max(profiles, key=lambda profile: profile.memory_bytes)
    raise UserError(
        f"No device can hold the model: its weights alone take {si(needed, 'B')}, and "
        f"the largest, {largest.name}, offers {si(largest.memory_bytes, 'B')}. Give "
        "devices more memory-bytes (in bytes), or choose a smaller model."
    )


def check_numbers(
    config: LolaDeftConfig, shapes: ModelShapes, profiles: Sequence[DeviceProfile]
) -> None:
    """Refuse fewer devices than the blocks need, where none may have several."""
    own_blocks = config.stack or config.blocks or config.tuning != "full"
    if own_blocks or config.selector != "all" or config.latency_target_s:
        return
    if config.devices_per_block == 1 or not config.backups:
        return  # a device takes several blocks
    # What they hold and how fast they are is looked at on the model.
    second = np.ones((len(profiles), partition_parameters(shapes.shapes).num_blocks))
    mode = RoundMode(
        devices_per_block=config.devices_per_block,
        participation=config.participation,
        backups=config.backups,
    )
    allocate(
        AllocationProblem(second, second, np.ones(second.shape, bool), mode=mode),
        "greedy",
    )


def plan_first_round(
    config: UpdatesConfig,
    model: Any,
    partition: BlockPartition,
    costs: BlockCosts,
    profiles: Sequence[DeviceProfile],
) -> None:
    """Plan the first round, as the server will."""
    # PyTorch takes seconds; what is above is said before that.
    from lola_flwr.app.methods import make_coordinator
    from lola_flwr.build import check_first_round

    needs_response = getattr(config, "selector", None) == NEEDS_RESPONSE
    coordinator = make_coordinator(
        config,
        model,
        partition,
        costs=costs,
        # How important blocks are decides which are trained, not which can be.
        response=(lambda _: 0.0) if needs_response else None,
    )
    check_first_round(coordinator, profiles)
