"""How long rounds take on the air: under FedAvg with best shares, and by blocks.

Both are planned for the same fleet and channel, those of a simulation of the project:
rounds differ in what devices return alone, the whole model in float32, or a block's
move as the strategy's default has it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from lola_flwr.build import (
    DeviceOptions,
    Transfer,
    coordinator_for_weights,
)
from lola_flwr.model.exchange import usual_names
from lola_flwr.strategies.served import DEVICES_PER_BLOCK, PROJECT_SETTINGS
from lola_flwr.system.devices import simulated_device
from tests.fedavg_apps.bench import Project

# Where the models are that the table compares, and what they are made with.
MODELS = {
    "quickstart": ("task", "Net", ()),
    "vit": ("task", "VisionTransformer", ()),
    "lora": ("models", "get_model", ("float32",)),
}


def planned_s(
    project: Project, app: Path, nodes: int, *, rounds: int, by_blocks: bool
) -> list[float]:
    """Return the wireless time after each of some rounds, seconds.

    Parameters
    ----------
    project, app
        The project, and a copy of it to import the model from.
    nodes, rounds
        How many there are.
    by_blocks
        Whether devices return blocks; else the whole model, as under FedAvg.
    """
    module, name, arguments = MODELS[project.name]
    sys.path.insert(0, str(app))
    try:
        model = getattr(import_module(f"{project.name}.{module}"), name)(*arguments)
    finally:
        sys.path.remove(str(app))
    allocation = replace(
        PROJECT_SETTINGS.allocation,
        returned_by=DEVICES_PER_BLOCK if by_blocks else nodes,
    )
    coordinator = coordinator_for_weights(
        model,
        example=torch.zeros(1, 3, 16, 16) if "16, 16" in project.diff else None,
        exchanged=usual_names(model),
        settings=replace(
            PROJECT_SETTINGS,
            transfer=PROJECT_SETTINGS.transfer if by_blocks else Transfer(),
            allocation=allocation,
            devices=DeviceOptions(train_all=True),
        ),
    )
    ids = [str(n) for n in range(nodes)]
    for n in ids:
        profile = simulated_device(int(n), seed=0)
        coordinator.add_device(n, profile.to_properties())
    total, after = 0.0, []
    for server_round in range(1, rounds + 1):
        total += coordinator.plan_round(server_round, ids).allocation.round_s
        after.append(total)
    return after
