"""Narrow each round's problem down to the blocks that are to be trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lola_flwr.allocation import AllocationProblem, RoundMode
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.randomness import rng_for
from lola_flwr.server.selection.history import BlockHistory, FloatArray
from lola_flwr.server.selection.importance import Response, Trials, measure_importance
from lola_flwr.server.selection.latency_target import most_valuable_blocks
from lola_flwr.server.selection.selectors import BlockSelector

FloatArrays = Mapping[str, npt.NDArray[np.float32]]
BlockValue = Literal["staleness", "equal"]

# Prefix of the values that training started from, in a snapshot.
_START = "start/"


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
        How the blocks' importance is measured, where a `response` is given.

    Raises
    ------
    UserError
        A field is out of range.
    """

    selector: BlockSelector | None = None
    latency_target_s: float = math.inf
    value: BlockValue = "staleness"
    trials: Trials = field(default_factory=Trials)

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


class BlockChooser:
    """Chooses each round's blocks, and remembers what became of them.

    Parameters
    ----------
    partition
        The model's blocks.
    selection
        How to choose.
    start
        Trainable values before the first round; copied where they are needed.
    response
        Gives the model's loss for some trainable values, on data that the server holds
        (default: the importance of blocks is not measured).
    seed
        Seed of the run.
    """

    def __init__(
        self,
        partition: BlockPartition,
        selection: Selection,
        *,
        start: FloatArrays,
        response: Response | None = None,
        seed: int = 0,
    ) -> None:
        self.history = BlockHistory.of(partition.num_blocks)
        self._partition = partition
        self._selection = selection
        self._response = response
        self._seed = seed
        self._before: dict[str, npt.NDArray[np.float32]] = {}
        self._start: FloatArrays = {}
        self.start_from(start)

    def start_from(self, values: FloatArrays) -> None:
        """Take note of the values that training starts from."""
        if self._response is not None:
            self._start = {name: array.copy() for name, array in values.items()}

    def snapshot(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return what `restore` needs beside the history: where training started."""
        return {_START + name: array for name, array in self._start.items()}

    def restore(
        self, history: BlockHistory, arrays: Mapping[str, npt.NDArray[np.float32]]
    ) -> None:
        """Go on from a snapshot, the arrays of which may hold more than this part."""
        self.history = history
        self._start = {name: arrays[_START + name] for name in self._start}

    def wanted(
        self, problem: AllocationProblem, server_round: int, values: FloatArrays
    ) -> AllocationProblem:
        """Return the round's problem with the blocks that the selector wants.

        Parameters
        ----------
        problem
            The problem of all the blocks that the round's mode names. Of the devices,
            only their number counts.
        server_round
            Round, from 1.
        values
            Trainable values now.
        """
        selection = self._selection
        if selection.takes_all:
            return problem
        allowed = np.flatnonzero(problem.demand).tolist()
        if self._response is not None and server_round % selection.trials.interval == 0:
            self.history = measure_importance(
                self.history,
                self._partition,
                start=self._start,
                values=values,
                response=self._response,
                trials=selection.trials,
                rng=rng_for(self._seed, "trials", server_round),
            )
        wanted: Collection[int] = allowed
        if selection.selector is not None:
            per_block = int(problem.demand[allowed].max())
            most = max(1, min(len(allowed), problem.num_devices // per_block))
            draw = partial(rng_for, self._seed)
            history = self.history.only(allowed)
            chosen = selection.selector(server_round, history, most, draw)
            if not set(chosen) <= set(range(len(allowed))):
                raise UserError(
                    f"The selector chose {list(chosen)} of {len(allowed)} blocks; it "
                    "numbers them from 0 on, as the history does."
                )
            # Of none, nobody could be asked: then all are wanted.
            wanted = [allowed[index] for index in chosen] or allowed
        return replace(problem, mode=replace(problem.mode, blocks=tuple(wanted)))

    def within_target(self, problem: AllocationProblem, server_round: int) -> RoundMode:
        """Return the round's mode with the wanted blocks that can be trained.

        Parameters
        ----------
        problem
            The problem of the wanted blocks.
        server_round
            Round, from 1.

        Raises
        ------
        InfeasibleAllocation
            None of the wanted blocks can be trained in time.
        """
        if self._selection.takes_all:
            return problem.mode
        blocks = most_valuable_blocks(
            problem,
            self._values(server_round),
            latency_target_s=self._selection.latency_target_s,
        )
        return replace(problem.mode, blocks=blocks)

    def before_step(self, values: FloatArrays) -> None:
        """Take note of the values that a step is about to change."""
        if not self._selection.takes_all:
            self._before = {name: array.copy() for name, array in values.items()}

    def after_step(
        self, server_round: int, blocks: Collection[int], values: FloatArrays
    ) -> None:
        """Take note of a step.

        Parameters
        ----------
        server_round
            Round, from 1.
        blocks
            Blocks that were stepped.
        values
            Trainable values after it.
        """
        moves = {block: self._relative_move(block, values) for block in set(blocks)}
        self._before = {}
        self.history = self.history.after_round(server_round, moves)

    def _relative_move(self, block: int, values: FloatArrays) -> float:
        if not self._before:
            return float("nan")
        names = self._partition.blocks[block]
        move = sum(float(np.sum((values[n] - self._before[n]) ** 2)) for n in names)
        size = sum(float(np.sum(self._before[n] ** 2)) for n in names)
        return float(np.sqrt(move / size)) if size else float("inf")

    def _values(self, server_round: int) -> FloatArray:
        if self._selection.value == "equal":
            return np.ones(self._partition.num_blocks)
        return self.history.staleness(server_round).astype(np.float64)
