"""D2FT as it is configured."""

from __future__ import annotations

from typing import Any

from lola_flwr.app.config import D2ftConfig
from lola_flwr.app.methods import limits_of, server_step_of
from lola_flwr.build import Channel, MicroBatches, trainer_for
from lola_flwr.d2ft.schedule import Budgets
from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.run.config import keyword_arguments
from lola_flwr.server.spread.trainer import SpreadTrainer


def make_trainer(
    config: D2ftConfig,
    model: Any,
    partition: BlockPartition,
    *,
    example_weight: int = 1,
) -> SpreadTrainer:
    """Put D2FT's trainer together for a model and a run configuration.

    Parameters
    ----------
    config
        Run configuration.
    model, partition
        The model, and its blocks.
    example_weight
        What an example weighs at most: its tokens where losses are means over tokens.
    """
    schedules, num_groups = schedules_of(config)
    return trainer_for(
        model,
        partition,
        schedules=schedules,
        num_groups=num_groups,
        micro_batches=MicroBatches(
            micro_batch_size=config.batch_size,
            max_tokens=config.max_length,
            example_weight=example_weight,
        ),
        step=server_step_of(config),
        channel=Channel(bandwidth_hz=config.bandwidth_hz),
        limits=limits_of(config),
        seed=config.seed,
    )


def schedules_of(config: D2ftConfig) -> tuple[StepSchedules, int | None]:
    """Return D2FT's schedules, and the head groups of each layer (None: its heads)."""
    options = keyword_arguments(config.d2ft_options)
    if "costs" in options:
        raise UserError("d2ft-options: costs follow from the model; take them out.")
    num_groups = options.pop("num_groups", None)
    try:
        budgets = Budgets(
            **{
                key: options.pop(key)
                for key in ("compute", "traffic")
                if key in options
            }
        )
        schedules = StepSchedules(budgets=budgets, seed=config.seed, **options)
    except TypeError as error:
        raise UserError(f"d2ft-options={config.d2ft_options!r}: {error}.") from None
    return schedules, num_groups
