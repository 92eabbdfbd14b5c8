"""How important each block's training is, by the response to damping it.

Source: Yao et al., "Layer-wise Importance Matters: Less Memory for Better Performance
in Parameter-efficient Fine-tuning of Large Language Models" (IST), arXiv:2410.11772,
with the numbers of its public code. There an adapter's output is damped; here the
blocks are layers, and what is damped is how far they have moved since the start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lola_flwr.arrays import Float32Arrays
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.server.selection.history import BlockHistory

# The mean loss that the model has with some trainable values, on data of the server's.
Response = Callable[[Float32Arrays], float]


@dataclass(frozen=True)
class Trials:
    """How the response is measured.

    Parameters
    ----------
    interval
        Rounds between measurements.
    count
        Trials of a measurement.
    damped_share
        Share of the blocks that a trial damps.
    factor
        What is left of a damped block's move.
    rate
        Step by which the importance is learned.
    """

    interval: int = 10
    count: int = 3
    damped_share: float = 0.5
    factor: float = 0.25
    rate: float = 10.0


def measure_importance(
    history: BlockHistory,
    partition: BlockPartition,
    *,
    start: Float32Arrays,
    values: Float32Arrays,
    response: Response,
    trials: Trials,
    rng: np.random.Generator,
) -> BlockHistory:
    """Return the history with what some trials have taught about importance.

    Parameters
    ----------
    history
        The history so far.
    partition
        The model's blocks.
    start, values
        Trainable values before the first round, and now.
    response
        Gives the loss; called once a trial, and never differentiated.
    trials
        How to measure.
    rng
        Draws the blocks that are damped.
    """
    num_blocks = history.num_blocks
    damped_count = max(1, round(trials.damped_share * num_blocks))
    damped_chance = 1 / (1 + np.exp(history.importance))
    rewards, masks = [], []
    for _ in range(trials.count):
        chosen = rng.choice(
            num_blocks,
            size=damped_count,
            replace=False,
            p=damped_chance / damped_chance.sum(),
        )
        damped = dict(values)
        for name in (name for block in chosen for name in partition.blocks[block]):
            move = values[name] - start[name]
            damped[name] = start[name] + np.float32(trials.factor) * move
        rewards.append(float(np.exp(-response(damped))))
        masks.append(np.isin(np.arange(num_blocks), chosen))
    # A trial that went better than the mean of all: its damped blocks matter less.
    advantage = np.array(rewards) - np.mean(rewards)
    slope = damped_chance * (1 - damped_chance)
    change = trials.rate * slope * (advantage @ np.array(masks))
    return replace(history, importance=history.importance - change)
