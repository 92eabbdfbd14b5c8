"""What would end a run in its first round, said before anything has started.

`lola-flwr simulate` calls `check`; a plain `flwr run` comes upon the same by itself.
What takes no PyTorch is looked at first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lola_flwr.allocation import AllocationProblem, RoundMode, allocate
from lola_flwr.costs.shapes import KNOWN_MODELS, ModelShapes, model_shapes
from lola_flwr.errors import UserError, si
from lola_flwr.machine.installation import require_extra
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.sources import OFFLINE_MODEL, RANDOM_SHAPES, check_source
from lola_flwr.server.selection import NEEDS_RESPONSE
from lola_flwr.system.devices import DeviceProfile
from lola_glue.config import D2ftConfig, GlueConfig, LolaDeftConfig, UpdatesConfig
from lola_glue.profiles import configured, simulated_profile
from lola_glue.tasks import check_data, find_task

_FLOAT32_BYTES = 4


def check(run_config: Mapping[str, object], num_devices: int) -> None:
    """Check that a run can start.

    Parameters
    ----------
    run_config
        Its configuration.
    num_devices
        Devices that are simulated.

    Raises
    ------
    UserError
        Data, model or an extra is missing; or the devices cannot train the model.
    """
    config = GlueConfig.from_run_config(run_config)
    check_data(config.task, config.data_dir)
    check_source(config.model)
    if config.tuning != "full":
        require_extra("adapters", "peft", f"tuning={config.tuning!r}")
    profiles = [
        configured(simulated_profile(config, index), config, index)
        for index in range(num_devices)
    ]
    shapes = _known_shapes(config.model)
    if shapes is not None:
        check_weights(shapes, profiles)
        if isinstance(config, LolaDeftConfig):
            check_numbers(config, shapes, profiles)
    check_on_the_model(config, profiles)


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
    """Refuse fewer devices than there are blocks, where every round trains all."""
    own_blocks = config.stack or config.blocks or config.tuning != "full"
    if own_blocks or config.selector != "all" or config.latency_target_s:
        return
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


def check_on_the_model(config: GlueConfig, profiles: Sequence[DeviceProfile]) -> None:
    """Load the model, count what it costs, and plan the first round."""
    # PyTorch takes seconds; what is above is said before that.
    from lola_flwr.build import check_first_round
    from lola_glue.costs import load_model, model_blocks
    from lola_glue.methods import make_coordinator, make_trainer

    model, _ = load_model(config, find_task(config.task))
    partition = model_blocks(config, model)
    if isinstance(config, D2ftConfig):
        make_trainer(config, model, partition)
    elif isinstance(config, UpdatesConfig):
        needs_response = getattr(config, "selector", None) == NEEDS_RESPONSE
        coordinator = make_coordinator(
            config,
            model,
            partition,
            # How important blocks are decides which are trained, not which can be.
            response=(lambda _: 0.0) if needs_response else None,
        )
        check_first_round(coordinator, profiles)


def _known_shapes(model: str) -> ModelShapes | None:
    """Return the shapes of a model that is on no hub, and so just what its name says.

    None where only the model itself tells.
    """
    name = model.removeprefix("random:")
    is_own = model == OFFLINE_MODEL or model in RANDOM_SHAPES
    return model_shapes(name) if is_own and name in KNOWN_MODELS else None
