"""The server's step in the space that gradients are projected to (GaLore)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import in_one
from lola_flwr.errors import UserError
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.wire.low_rank import LowRankProjection


class LowRankOptimizer:
    """Steps projected gradients, and moves the model by what the steps lift to.

    An optimizer of torch.optim holds its moments in the projected space, which is what
    makes them small. It steps from zero, so that its parameters after a step are the
    step itself; a decay of the weights has nothing to act on there. As in GaLore the
    moments stay when the projection is renewed.

    Parameters
    ----------
    state
        Initial values by parameter name; copied.
    projection
        The projection that devices apply.
    **options
        Optimizer, schedule and their options, as for `ServerOptimizer`.

    Attributes
    ----------
    flat
        As of `ServerOptimizer`.
    """

    def __init__(
        self,
        state: Mapping[str, npt.NDArray[np.float32]],
        projection: LowRankProjection,
        **options: Any,
    ) -> None:
        self.flat, self._values = in_one(state)
        self._projection = projection
        self._zeros = {
            name: np.zeros(projection.shape(values.shape), np.float32)
            for name, values in self._values.items()
        }
        self._inner = ServerOptimizer(self._zeros, **options)

    def step(
        self, gradient: Mapping[str, npt.NDArray[np.float32]], server_round: int = 1
    ) -> None:
        """Take one step.

        Parameters
        ----------
        gradient
            Gradients of the parameters' own shapes; what lies outside the projection's
            range is lost.
        server_round
            Round, from 1: that of the projection.
        """
        self._inner.load(self._zeros)
        project, lift = self._projection.project, self._projection.lift
        self._inner.step(
            {name: project(server_round, name, g) for name, g in gradient.items()}
        )
        moved = self._inner.state()
        for name in gradient:
            values = self._values[name]
            values += lift(server_round, name, moved[name], values.shape)

    def shift(self, moves: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Move some parameters past the optimizer; its moments stay."""
        for name, move in moves.items():
            self._values[name] += move

    def load(self, values: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Overwrite the values; the moments stay."""
        for name, own in self._values.items():
            own[...] = values[name]

    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the current values by name, as views: the next step changes them."""
        return {name: values[...] for name, values in self._values.items()}

    def snapshot(self) -> Snapshot:
        """Return values, moments and the schedule's place, as views."""
        inner = self._inner.snapshot()
        arrays = {f"inner/{name}": array for name, array in inner.arrays.items()}
        values = {f"values/{name}": array for name, array in self._values.items()}
        return Snapshot({**arrays, **values}, inner.values)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, in an optimizer made with the same arguments.

        Raises
        ------
        UserError
            The snapshot is of another optimizer.
        """
        kept: dict[str, dict[str, npt.NDArray[Any]]] = {"inner": {}, "values": {}}
        for name, array in snapshot.arrays.items():
            part, _, rest = name.partition("/")
            kept.setdefault(part, {})[rest] = array
        if set(kept["values"]) != set(self._values):
            raise UserError(
                "The checkpoint is of an optimizer without low-rank projection; use "
                "the options that it was made with."
            )
        self._inner.restore(Snapshot(kept["inner"], snapshot.values))
        self.load(kept["values"])
