"""Which blocks a round is to train, where it does not train all of them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import numpy as np

from lola_flwr.allocation import RoundMode
from lola_flwr.arrays import Float32Arrays, Float64Array
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.randomness import rng_for
from lola_flwr.server.selection.history import BlockHistory
from lola_flwr.server.selection.importance import Response, Trials
from lola_flwr.server.selection.selectors import BlockSelector

BlockValue = Literal["staleness", "equal"]


@dataclass(frozen=True)
class Selection:
    """How a round's blocks are chosen; without any argument, all of them are.

    Parameters
    ----------
    selector
        Names the blocks that are wanted; None: all of them.
    latency_target_s
        Of the wanted blocks, the most valuable ones are kept that a round can finish
        within this time, seconds; infinite: all that the devices can hold.
    value
        What a block is worth then: "staleness", the rounds since it was last trained;
        or "equal", so that as many blocks as possible are kept.
    trials
        How the blocks' importance is measured, where there is a response.
    response
        Gives the loss that the model has with some trainable values, on data of the
        server's (default: the importance of blocks is not measured).

    Raises
    ------
    UserError
        A field is out of range.
    """

    selector: BlockSelector | None = None
    latency_target_s: float = math.inf
    value: BlockValue = "staleness"
    trials: Trials = field(default_factory=Trials)
    response: Response | None = None

    def __post_init__(self) -> None:
        if not self.latency_target_s > 0:
            raise UserError(
                f"latency_target_s={self.latency_target_s:g} s must be positive."
            )
        if self.value not in get_args(BlockValue):
            raise UserError(
                f"value={self.value!r} is unknown; choose from "
                f"{', '.join(get_args(BlockValue))}."
            )

    def check(self, mode: RoundMode) -> None:
        """Check that a mode of the rounds goes with this choice.

        Raises
        ------
        UserError
            It does not.
        """
        if mode.backups and math.isfinite(self.latency_target_s):
            raise UserError(
                f"backups={mode.backups} take band that latency_target_s="
                f"{self.latency_target_s:g} s has no room for; drop one of the two."
            )

    @property
    def takes_all(self) -> bool:
        """Whether every round trains every block."""
        return self.selector is None and math.isinf(self.latency_target_s)

    def wanted(
        self,
        mode: RoundMode,
        history: BlockHistory,
        server_round: int,
        *,
        num_devices: int,
        seed: int,
    ) -> RoundMode:
        """Return a round's mode with the blocks that the selector wants.

        Parameters
        ----------
        mode
            Which blocks it may choose from, and how many devices each needs.
        history
            What became of the blocks so far.
        server_round
            Round, from 1.
        num_devices
            Devices that are there.
        seed
            Seed of the run.

        Raises
        ------
        UserError
            The selector chose a block that there is not.
        """
        if self.takes_all:
            return mode
        demand = mode.demand(history.num_blocks)
        allowed = np.flatnonzero(demand).tolist()
        wanted: Collection[int] = allowed
        if self.selector is not None:
            most = max(1, min(len(allowed), num_devices // int(demand.max())))
            draw = partial(rng_for, seed)
            chosen = self.selector(server_round, history.only(allowed), most, draw)
            if not set(chosen) <= set(range(len(allowed))):
                raise UserError(
                    f"The selector chose {list(chosen)} of {len(allowed)} blocks; it "
                    "numbers them from 0 on, as the history does."
                )
            # Of none, nobody could be asked: then all are wanted.
            wanted = [allowed[index] for index in chosen] or allowed
        return replace(mode, blocks=tuple(wanted))

    def worth(self, history: BlockHistory, server_round: int) -> Float64Array | None:
        """Return what each block is worth, [N]; None where all that are wanted are."""
        if self.takes_all:
            return None
        if self.value == "equal":
            return np.ones(history.num_blocks)
        return history.staleness(server_round).astype(np.float64)

    def measures_in(self, server_round: int) -> bool:
        """Tell whether the blocks' importance is measured before a round."""
        return (
            self.response is not None
            and not self.takes_all
            and server_round % self.trials.interval == 0
        )


def relative_moves(
    partition: BlockPartition,
    blocks: Collection[int],
    before: Float32Arrays,
    after: Float32Arrays,
) -> dict[int, float]:
    """Return how far some blocks have moved, relative to the norm of their values.

    Parameters
    ----------
    partition
        The model's blocks.
    blocks
        Blocks that were stepped.
    before, after
        Trainable values before and after the step; without any before, the moves are
        not measured (NaN).
    """
    if not before:
        return dict.fromkeys(blocks, math.nan)
    moves = {}
    for block in set(blocks):
        names = partition.blocks[block]
        move = sum(float(np.sum((after[n] - before[n]) ** 2)) for n in names)
        size = sum(float(np.sum(before[n] ** 2)) for n in names)
        moves[block] = float(np.sqrt(move / size)) if size else math.inf
    return moves
