"""Which device holds which values of the model, and what the server knows of them.

A device steps what it holds by itself, so that values travel only when they change
hands, and when somebody looks at them. The server steps what belongs to a layer as a
whole: normalisations, biases, the halves of low-rank adapters that are not cut, and the
head.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lola_flwr.arrays import Float32Array
from lola_flwr.d2ft.subnetworks import Subnetworks
from lola_flwr.d2ft.wire import MOMENTS, PartSlices, array_of, part_slices
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.optimizer import ServerOptimizer, require_elementwise
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.server.spread.exchange import LARGEST_VALUE
from lola_flwr.server.spread.places import Place
from lola_flwr.wire.packing import VALUES

# Flower's, which goes into the run's output.
_logger = logging.getLogger("flwr")

# The one value of an optimizer that only counts.
_CLOCK = "clock"


@dataclass(frozen=True)
class _Hold:
    """That a device holds the values of a place.

    ``sent_step``, ``gradient_step`` and ``scale`` are those of `PartTask`; ``known``
    and ``known_moments`` are the versions of the server's own copy.
    """

    device: str
    sent_step: int
    known: int
    known_moments: int
    gradient_step: int = 0
    scale: float = 1.0


class HeldValues:
    """The trainable values: those that the server steps, and its copy of the others.

    Parameters
    ----------
    optimizer
        Holds all of them, and steps the server's own.
    model, partition
        The model, and its blocks.
    subnetworks
        Its sub-networks.

    Raises
    ------
    UserError
        The optimizer does not step each value by itself, or has arguments that cannot
        be sent.
    """

    def __init__(
        self,
        optimizer: ServerOptimizer,
        model: nn.Module,
        partition: BlockPartition,
        subnetworks: Subnetworks,
    ) -> None:
        require_elementwise(optimizer)
        try:
            self._arguments = json.dumps(optimizer.arguments)
        except TypeError:
            raise UserError(
                f"optimizer={optimizer.arguments!r}: devices step what they hold by "
                "themselves, so its options must be numbers, texts, and lists of such."
            ) from None
        self._optimizer = optimizer
        self._subnetworks = subnetworks
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._trainable = trainable = partition.trainable
        cut = {piece.name for pieces in subnetworks.slices for piece in pieces}
        self._cut = tuple(name for name in trainable if name in cut)
        self.own_names = tuple(name for name in trainable if name not in cut)
        self._clock = optimizer.like({_CLOCK: np.zeros(1, np.float32)})
        self._holds: dict[Place, _Hold] = {}
        self._slices: dict[Place, PartSlices] = {}
        # What was known before a device returned what no audit has confirmed.
        self._before: dict[Place, Sequence[list[Tensor]]] = {}

    # --- values ----------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Steps of the optimizer."""
        return self._optimizer.steps

    def known(self) -> dict[str, Float32Array]:
        """Return the server's copy of all values, as views."""
        return self._optimizer.state()

    def slices(self, place: Place) -> PartSlices:
        """Return what of which parameters a place is."""
        if place not in self._slices:
            self._slices[place] = part_slices(
                self._names,
                self._subnetworks.layers[place.layer_index],
                place.branch,
                place.first_group,
                place.last_group,
                self._trainable,
            )
        return self._slices[place]

    @cached_property
    def moment_names(self) -> list[str]:
        """What the optimizer keeps beside each value."""
        # The clock itself is not to be ahead.
        fresh = self._optimizer.like({_CLOCK: np.zeros(1, np.float32)})
        return [*fresh.moments([_CLOCK])[_CLOCK]]

    # --- who holds what --------------------------------------------------------------

    def fields(self, place: Place) -> dict[str, Any]:
        """Return the fields of a task about what a device holds."""
        hold = self._holds[place]
        return {
            **place.fields(),
            "version": self.version,
            "sent_step": hold.sent_step,
            "gradient_step": hold.gradient_step,
            "scale": hold.scale,
        }

    @property
    def holders(self) -> set[str]:
        """The devices that hold something."""
        return {hold.device for hold in self._holds.values()}

    def is_held(self, place: Place, device: str) -> bool:
        """Tell whether a device was sent the values of a place."""
        hold = self._holds.get(place)
        return hold is not None and hold.device == device

    def send(
        self, place: Place, device: str, step: int
    ) -> tuple[dict[str, npt.NDArray[Any]], str]:
        """Hand the values of a place over to a device, as the server knows them.

        Returns
        -------
        What it is sent, and what is said of the optimizer.
        """
        self.release([place])
        self._holds[place] = _Hold(device, step, self.version, self.version)
        return self.content(place)

    def content(self, place: Place) -> tuple[dict[str, npt.NDArray[Any]], str]:
        """Return what the server knows of a place, and what steps it, to be sent."""
        values, moments = self._own(place)
        arrays: dict[str, npt.NDArray[Any]] = {VALUES: array_of(values)}
        if self.version:
            arrays[MOMENTS] = array_of(moments)
        counts = json.dumps(self._clock.counts(_CLOCK) if self.version else {})
        return arrays, f'{{"arguments": {self._arguments}, "counts": {counts}}}'

    def unknown(
        self, places: Iterable[Place] | None = None, *, moments: bool
    ) -> dict[Place, str]:
        """Return what devices hold in a newer version than the server, and who.

        Parameters
        ----------
        places
            Places to look at (default: all).
        moments
            Whether the optimizer's moments are to be known, too.
        """
        version = self.version
        return {
            place: hold.device
            for place, hold in self._holds.items()
            if (places is None or place in places)
            and (hold.known < version or (moments and hold.known_moments < version))
            and self.slices(place).own
        }

    def moved(self, places: Mapping[Place, str]) -> list[Place]:
        """Return what is held by others than who is to hold it from now on."""
        return [p for p, hold in self._holds.items() if places.get(p) != hold.device]

    def release(self, places: Iterable[Place]) -> None:
        """Take places back: what the server knows is what holds."""
        mine = list(places)
        self._note_loss(mine)
        for place in mine:
            self._holds.pop(place, None)
            self._before.pop(place, None)

    def lose(self, devices: Collection[str], *, lied: bool = False) -> None:
        """Take back what devices hold that failed, lied, or have left."""
        lost = {p for p, h in self._holds.items() if h.device in devices}
        for place in self._before.keys() & lost if lied else ():
            self._overwrite(place, *self._before[place])
        self.release(lost)

    def confirm(self, place: Place) -> None:
        """Take note that what is known of a place is what its device computes with."""
        self._before.pop(place, None)

    def take_in(
        self, place: Place, values: Sequence[Tensor], moments: Sequence[Tensor] | None
    ) -> None:
        """Take note of what a device holds.

        Parameters
        ----------
        place
            The place.
        values
            Its values, part by part.
        moments
            For each part its moments, in the order of their names; None: not told.

        Raises
        ------
        ValueError
            An optimizer could not go on with them.
        """
        hold = replace(self._holds[place], known=self.version)
        if moments is not None:
            trial = self._stepped(values, moments)
            if not all((abs(v) <= LARGEST_VALUE).all() for v in trial.state().values()):
                raise ValueError("moments hold what no step goes on from")
            hold = replace(hold, known_moments=self.version)
        copies = [[tensor.clone() for tensor in each] for each in self._own(place)]
        self._before.setdefault(place, copies)
        self._overwrite(place, values, moments or ())
        self._holds[place] = hold

    def _own(self, place: Place) -> tuple[list[Tensor], list[Tensor]]:
        """Return the values of a place and their moments, part by part, as views."""
        own, known = self.slices(place).own, _tensors(self.known())
        values = [piece.of(known[piece.name]) for piece in own]
        if not self.version:
            return values, []
        held = self._optimizer.moments(dict.fromkeys(piece.name for piece in own))
        return values, [
            piece.of(torch.from_numpy(held[piece.name][key]))
            for piece in own
            for key in self.moment_names
        ]

    def _overwrite(
        self, place: Place, values: Sequence[Tensor], moments: Sequence[Tensor]
    ) -> None:
        own, beside = self._own(place)
        for target, value in zip(own, values, strict=True):
            target.copy_(value)
        for target, value in zip(beside if moments else (), moments, strict=True):
            target.copy_(value)

    def _stepped(
        self, values: Sequence[Tensor], moments: Sequence[Tensor]
    ) -> ServerOptimizer:
        """Return what a step without a gradient makes of values and moments."""
        keys = self.moment_names
        named = {str(index): value.numpy() for index, value in enumerate(values)}
        trial = self._optimizer.like(named)
        if self.version:
            rows = {name: moments[int(name) * len(keys) :] for name in named}
            trial.go_on(
                self.version,
                {
                    name: {k: m.numpy() for k, m in zip(keys, row, strict=False)}
                    for name, row in rows.items()
                },
                self._clock.counts(_CLOCK),
            )
        trial.step({name: np.zeros(v.shape, np.float32) for name, v in named.items()})
        return trial

    # --- steps -----------------------------------------------------------------------

    def step(
        self,
        gradients: Mapping[str, Float32Array],
        step: int,
        scale: float,
        places: Collection[Place],
        unheld: Collection[Place] = (),
    ) -> None:
        """Step the server's own, and let the devices' steps of this one count.

        Parameters
        ----------
        gradients
            Those of the server's own, by name.
        step
            The step.
        scale
            What devices multiply theirs by.
        places
            Places of which devices have a gradient.
        unheld
            Places of which no device has been sent the values: they have none.
        """
        stepped = {
            place: self._stepped(*self._own(place))
            for place in unheld
            if self.slices(place).own
        }
        for place in places:
            self._holds[place] = replace(
                self._holds[place], gradient_step=step, scale=scale
            )
        self._optimizer.step(gradients, step)
        self._clock.step({_CLOCK: np.zeros(1, np.float32)})
        for place, optimizer in stepped.items():
            values = _tensors(optimizer.state())
            beside = optimizer.moments(values).values()
            moments = [torch.from_numpy(m) for each in beside for m in each.values()]
            self._overwrite(place, [*values.values()], moments)

    def differ(self, values: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Tell whether values are others than those that the server knows.

        Raises
        ------
        UserError
            They are of another model.
        """
        known = self.known()
        own = {name: value.shape for name, value in known.items()}
        given = {name: value.shape for name, value in values.items()}
        if own != given:
            name = min(n for n in own | given if own.get(n) != given.get(n))
            raise UserError(
                f"Initial arrays: {name} has shape {given.get(name)}; expected "
                f"{own.get(name)}. Pass those of the model that the trainer was made "
                "for."
            )
        return any(not np.array_equal(values[n], value) for n, value in known.items())

    def start_from(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Overwrite all values; what devices hold is no longer of use."""
        self._holds.clear()
        self._before.clear()
        self._optimizer.load(values)

    # --- checkpoints -----------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return what the server knows, as of an optimizer that steps all values."""
        if self.version:
            self._optimizer.moments(self._cut)
            self._optimizer.set_counts(self._cut, self._clock.counts(_CLOCK))
        return self._optimizer.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, or raise `UserError` if it is of other parameters."""
        self._optimizer.restore(snapshot)
        self._holds.clear()
        self._before.clear()
        self._clock = self._optimizer.like({_CLOCK: np.zeros(1, np.float32)})
        if self.version:
            self._clock.go_on(
                self.version,
                self._clock.moments([_CLOCK]),
                self._optimizer.counts(self._trainable[0]),
            )

    def _note_loss(self, places: Sequence[Place]) -> None:
        """Say what the server never came to know of places that it takes back."""
        for place, device in self.unknown(places, moments=False).items():
            known = self._holds[place].known
            _logger.warning(
                "device %s no longer has its part of %s: it is as it was %d steps "
                "before",
                device,
                place,
                self.version - known,
            )


def _tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
