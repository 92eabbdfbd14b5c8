"""The model that a run trains: its values, what devices are sent, and its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Arrays
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.exchange import Exchange
from lola_flwr.model.statistics import statistics_names, within_bounds
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.server.assembly import BlockUpdate, average_statistics, block_mean_named
from lola_flwr.server.low_rank_optimizer import LowRankOptimizer
from lola_flwr.server.steadied import steadied
from lola_flwr.wire.npy import WireArray
from lola_flwr.wire.packing import pack
from lola_flwr.wire.payload import array_bytes
from lola_flwr.wire.versions import Versions, model_pieces

# Prefixes, in a snapshot, of the values that training started from, and of what the
# last round moved.
_START = "start/"
_LAST = "last-move/"


class ServedModel:
    """The model on the server.

    Parameters
    ----------
    partition
        Its blocks.
    optimizer
        Holds the trainable values, and steps them.
    base_fingerprint
        Digest of the frozen weights.
    state_dict
        All arrays in the order to send them in; None: the trainable ones alone are
        sent. Only trainable ones and running statistics ever change.
    block_mean
        How the updates of one block, and of the head, are put together, and those of
        one running statistic: "mean", or one that a few hostile devices cannot move,
        "median" or "trimmed".
    steady
        Whether moves of blocks that few of a round's devices return are steadied by
        the last round's, see `lola_flwr.server.steadied`.
    exchange
        Where devices hold arrays under other names than they are sent, or some that
        they are not: what these are.

    Raises
    ------
    UserError
        The state dict lacks what is to be trained, or there is no such mean.
    """

    def __init__(
        self,
        partition: BlockPartition,
        optimizer: ServerOptimizer | LowRankOptimizer,
        *,
        base_fingerprint: str,
        state_dict: Mapping[str, npt.NDArray[Any]] | None = None,
        block_mean: str = "mean",
        steady: bool = False,
        exchange: Exchange | None = None,
    ) -> None:
        self.partition = partition
        self.exchange = exchange
        self.base_fingerprint = base_fingerprint
        self.is_sent_whole = state_dict is not None
        self._optimizer = optimizer
        self._assemble = block_mean_named(block_mean)
        self._block_mean = block_mean
        # What the last round moved, where moves are steadied.
        self._is_steady = steady
        self._last_moves: Float32Arrays = {}
        # Values to measure moves from; empty, unless `remember_start` was called.
        self._start: Float32Arrays = {}
        # The optimizer holds the trainable values: no second copy of them is kept.
        state = optimizer.state()
        self._state_dict = {
            name: state[name] if name in state and own.dtype == np.float32 else own
            for name, own in (state if state_dict is None else state_dict).items()
        }
        missing = [name for name in partition.trainable if name not in self._state_dict]
        if missing:
            raise UserError(
                f"state_dict lacks {missing[0]}, which is to be trained; pass that of "
                "the whole model."
            )

    # --- values ----------------------------------------------------------------------

    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the trainable parameters' current values, as views."""
        return self._optimizer.state()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what devices are sent, by name in the order of sending.

        The server steps in float32; what it sends has the types of the state dict.
        """
        state = self._optimizer.state()
        return {
            name: state[name].astype(own.dtype, copy=False) if name in state else own
            for name, own in self._state_dict.items()
        }

    def packed(self, names: Sequence[str]) -> WireArray:
        """Return the values of some trainable parameters in one array.

        They are ordered as by `lola_flwr.wire.packing.pack`; of all parameters it is a
        view, which the next step changes.
        """
        state = self._optimizer.state()
        if state.keys() == {*names}:
            return self._optimizer.flat
        return pack({name: state[name] for name in names})

    def nbytes(self) -> dict[str, int]:
        """Return the bytes of each array that devices are sent."""
        return {name: values.nbytes for name, values in self._state_dict.items()}

    def statistics_bytes(self) -> int:
        """Return the bytes that the running statistics take in a message."""
        nbytes = self.nbytes()
        return sum(array_bytes(name, nbytes[name]) for name in statistics_names(nbytes))

    def constants(self) -> dict[str, npt.NDArray[Any]]:
        """Return those of the arrays that never change, by name."""
        changing = {*self._optimizer.state(), *statistics_names(self._state_dict)}
        return {n: v for n, v in self._state_dict.items() if n not in changing}

    def versions(self) -> Versions:
        """Return what tells this model's versions by its arrays."""
        names, constants = tuple(self._state_dict), self.constants()
        return Versions(
            model_pieces(self.partition, names),
            {i: constants[name] for i, name in enumerate(names) if name in constants},
        )

    # --- steps -----------------------------------------------------------------------

    def step(
        self,
        server_round: int,
        updates: Sequence[BlockUpdate],
        *,
        zeroth_order_lr: float = 0.0,
        lengths: Mapping[int, float] | None = None,
    ) -> None:
        """Step the model by one round's updates; statistics are averaged.

        Parameters
        ----------
        server_round
            Round, from 1.
        updates
            The updates; their order can matter.
        zeroth_order_lr
            Rate of a plain step by estimated gradients, which goes past the optimizer.
        lengths
            By block: what part of the optimizer's step is taken, at most 1 (default:
            all of it).
        """
        first_order = [u for u in updates if not u.zeroth_order]
        gradient = self._assemble(first_order)
        if self._is_steady:
            blocks = self.partition.blocks
            gradient = steadied(gradient, self._last_moves, first_order, blocks)
            self._last_moves = {n: gradient[n].copy() for n in gradient}
        estimate = self._assemble([u for u in updates if u.zeroth_order])
        if gradient:
            self._step(gradient, server_round, {} if lengths is None else lengths)
        if estimate:
            rate = np.float32(zeroth_order_lr)
            self._optimizer.shift({name: -rate * g for name, g in estimate.items()})
        self._state_dict |= average_statistics(updates, self._block_mean)

    def _step(
        self, gradient: Float32Arrays, server_round: int, lengths: Mapping[int, float]
    ) -> None:
        """Step by a gradient; some blocks by a part of the step."""
        values = self._optimizer.state()
        part_of = {
            name: np.float32(length)
            for block, length in lengths.items()
            if length < 1.0
            for name in self.partition.blocks[block]
            if name in gradient
        }
        before = {name: values[name].copy() for name in part_of}
        self._optimizer.step(gradient, server_round)
        values = self._optimizer.state()
        # The moments are those of the gradient as it is.
        self._optimizer.shift(
            {
                name: (part - 1) * (values[name] - before[name])
                for name, part in part_of.items()
            }
        )

    def start_from(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in the values to start from.

        Raises
        ------
        UserError
            They are not those of this model, or frozen ones differ.
        """
        own, constants = self.arrays(), self.constants()
        if set(arrays) != set(own):
            name = min(set(arrays) ^ set(own))
            raise UserError(
                f"Initial arrays: {name} is {'missing' if name in own else 'unknown'}; "
                "pass the arrays of the model that the coordinator was made for."
            )
        for name, array in arrays.items():
            if array.shape != own[name].shape:
                raise UserError(
                    f"Initial arrays: {name} has shape {array.shape}; expected "
                    f"{own[name].shape}."
                )
            if name in constants and not np.array_equal(array, own[name]):
                raise UserError(
                    f"Initial arrays: {name}, which nobody trains, differs from that "
                    "of the model that the coordinator was made for; load the same "
                    "weights for both."
                )
        self.adopt(arrays)
        if self._start:
            self.remember_start()

    def remember_start(self) -> None:
        """Keep a copy of the present trainable values, as those to start from."""
        self._start = {name: values.copy() for name, values in self.state().items()}

    @property
    def start(self) -> Float32Arrays:
        """The trainable values that training started from, if they are kept."""
        return self._start

    def adopt(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in values that something around the strategy has changed."""
        self._optimizer.load(arrays)
        for name in statistics_names(self._state_dict):
            own = self._state_dict[name]
            self._state_dict[name] = within_bounds(name, arrays[name], own.dtype)

    # --- checkpoints -----------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return values, statistics, and the optimizer's state."""
        optimizer = self._optimizer.snapshot()
        statistics = {
            f"statistics/{name}": self._state_dict[name]
            for name in statistics_names(self._state_dict)
        }
        return Snapshot(
            {
                **optimizer.arrays,
                **statistics,
                **{_START + name: values for name, values in self._start.items()},
                **{_LAST + name: values for name, values in self._last_moves.items()},
            },
            {
                "base_fingerprint": self.base_fingerprint,
                "optimizer": optimizer.values,
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, which may hold more than this model's part.

        Raises
        ------
        UserError
            The snapshot is of another model.
        """
        if snapshot.values["base_fingerprint"] != self.base_fingerprint:
            raise UserError(
                "The checkpoint is of a model with other frozen weights; use the "
                "model, revision and seed that it was made with."
            )
        self._optimizer.restore(Snapshot(snapshot.arrays, snapshot.values["optimizer"]))
        for name in statistics_names(self._state_dict):
            self._state_dict[name] = snapshot.arrays[f"statistics/{name}"]
        self._start = {name: snapshot.arrays[_START + name] for name in self._start}
        self._last_moves = {
            name.removeprefix(_LAST): np.array(values)
            for name, values in snapshot.arrays.items()
            if name.startswith(_LAST)
        }
