"""What a strategy serves: a coordinator, or the model of a project that FedAvg trained.

Of a model the coordinator is made when the project's first arrays tell what it
exchanges with its devices.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from logging import INFO
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.common.logger import log

from lola_flwr.build import (
    AllocationOptions,
    DeviceOptions,
    RoundMode,
    RoundSettings,
    ServerStep,
    Transfer,
    coordinator_for_weights,
)
from lola_flwr.device.own_training import Model
from lola_flwr.errors import UserError, brief
from lola_flwr.model.exchange import names_of_list, usual_names
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.strategies.block_rounds import BlockRounds
from lola_flwr.strategies.rounds import OnRound, Waits
from lola_flwr.system.devices import DeviceProfile

Encoded = TypeVar("Encoded")

# How many devices return each block of a project. The mean of fewer is too noisy to
# learn as FedAvg does, which has the mean of all (docs/migration.md has figures).
DEVICES_PER_BLOCK = 6
_PER_BLOCK = "devices_per_block"
Arrays = Mapping[str, npt.NDArray[Any]]

# What is taken of a device that states nothing: that it can do what FedAvg's devices
# do. Its speed is corrected by the times that it reports.
ASSUMED_PROFILE = DeviceProfile(
    name="assumed", flops_per_s=1e11, memory_bytes=1e12, snr_db=10.0
)

# As under FedAvg, whoever is there takes part: several devices a block, or several
# blocks a device, in turn where these are too much for it.
PROJECT_SETTINGS = RoundSettings(
    transfer=Transfer(codec="fp16", downlink="changed"),
    allocation=AllocationOptions(mode=RoundMode(participation="all"), partial=True),
    devices=DeviceOptions(assumed_profile=ASSUMED_PROFILE),
)


# A move towards what devices return, of which several tell.
PROJECT_STEP = ServerStep(optimizer="SGD", lr=1.0, steady=True)


class Served(Generic[Encoded]):
    """A coordinator and its rounds, which come with the first arrays of a model.

    Parameters
    ----------
    given
        The coordinator, or a model.
    options
        Of a model: what ``coordinator_for_weights`` takes besides, and
        ``devices_per_block``, so many of which are to return each block.
    encode
        Encodes an array for the wire.
    min_available, waits, on_round
        As for `BlockRounds`.
    """

    def __init__(
        self,
        given: Coordinator | Model,
        options: Mapping[str, Any],
        *,
        encode: Callable[[npt.NDArray[Any]], Encoded],
        min_available: int | None,
        waits: Waits | None,
        on_round: OnRound | None,
    ) -> None:
        self.waits = waits or Waits()
        self._encode = encode
        self._min_available = min_available
        self._on_round = on_round
        self._model: Model | None = None
        self._options = dict(options)
        self._made: tuple[Coordinator, BlockRounds, dict[str, Encoded]] | None = None
        self._given: Coordinator | None = None
        if isinstance(given, Coordinator):
            if options:
                raise UserError(
                    f"{', '.join(options)}: a coordinator has these already; give them "
                    "to coordinator_for_weights, or the strategy the model itself."
                )
            self._given = given
        elif not isinstance(given, Model):
            raise UserError(
                f"The strategy is given {brief(given)}; give it the model before "
                "FedAvg's arguments, as a torch.nn.Module, or a coordinator."
            )
        else:
            self._model = given
            settings = self._options.get("settings", PROJECT_SETTINGS)
            if settings.devices.train_all is None:
                devices = replace(settings.devices, train_all=True)
                settings = replace(settings, devices=devices)
            wanted = self._options.pop(_PER_BLOCK, None)
            if wanted is not None and wanted < 1:
                raise UserError(f"{_PER_BLOCK}={wanted} must be at least 1.")
            if wanted is None and settings.allocation.returned_by == 1:
                wanted = DEVICES_PER_BLOCK
            if wanted is not None:
                allocation = replace(settings.allocation, returned_by=wanted)
                settings = replace(settings, allocation=allocation)
            self._options["settings"] = settings
            self._options.setdefault("step", PROJECT_STEP)

    @property
    def is_made(self) -> bool:
        """Whether the coordinator is known."""
        return self._made is not None or self._given is not None

    @property
    def coordinator(self) -> Coordinator:
        """The coordinator; before a project's arrays are known, that of the usual."""
        return self._all()[0]

    @property
    def rounds(self) -> BlockRounds:
        """The coordinator's rounds."""
        return self._all()[1]

    @property
    def constants(self) -> dict[str, Encoded]:
        """Arrays that never change, encoded once."""
        return self._all()[2]

    def encoded(self) -> dict[str, Encoded]:
        """Return the coordinator's arrays, encoded, in the order of sending."""
        constants = self.constants
        return {
            name: constants[name] if name in constants else self._encode(values)
            for name, values in self.coordinator.arrays().items()
        }

    def prepare(self, arrays: Arrays) -> None:
        """Make the coordinator for the arrays that a project exchanges.

        Raises
        ------
        UserError
            They are not the model's.
        """
        if self._model is not None and self._is_new(arrays):
            self._make(self._coordinator_of(arrays))

    def named(self, arrays: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return the first arrays of a run, of which the order alone tells the names.

        Raises
        ------
        UserError
            They are not the model's.
        """
        exchanged = self._options.get("exchanged")
        if exchanged is not None:
            names = [*exchanged]
        elif self._model is not None:
            names = [*names_of_list(self._model, arrays)]
        else:
            names = [*self.coordinator.arrays()]
        if len(names) != len(arrays):
            raise UserError(
                f"Initial arrays: {len(arrays)}, but the names of {len(names)} are "
                f"known ({names[0]}, ...); pass the arrays of these names."
            )
        return dict(zip(names, arrays, strict=True))

    def _is_new(self, arrays: Arrays) -> bool:
        """Tell whether arrays are other ones than a coordinator was made for."""
        if self._made is None:
            return True
        coordinator = self._made[0]
        own, constants = coordinator.arrays(), coordinator.constants()
        return not coordinator.server_round and (
            [*own] != [*arrays]
            or not all(np.array_equal(arrays[n], v) for n, v in constants.items())
        )

    def _coordinator_of(self, arrays: Arrays | None) -> Coordinator:
        assert self._model is not None
        options = {**self._options}
        if arrays is not None:
            options["exchanged"] = arrays
        elif options.get("exchanged") is None:
            options["exchanged"] = usual_names(self._model)
        return coordinator_for_weights(self._model, **options)

    def _all(self) -> tuple[Coordinator, BlockRounds, dict[str, Encoded]]:
        if self._made is None:
            self._make(self._given or self._coordinator_of(None))
            assert self._made is not None
        return self._made

    def _make(self, coordinator: Coordinator) -> None:
        rounds = BlockRounds(
            coordinator,
            min_available=self._min_available,
            waits=self.waits,
            on_round=self._on_round,
        )
        constants = coordinator.constants().items()
        encoded = {name: self._encode(values) for name, values in constants}
        self._made = coordinator, rounds, encoded


def divided(
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a strategy's arguments into those of the coordinator, and FedAvg's."""
    parameters = inspect.signature(coordinator_for_weights).parameters.values()
    names = {_PER_BLOCK, *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)}
    ours = {name: value for name, value in options.items() if name in names}
    return ours, {n: value for n, value in options.items() if n not in names}


def arguments_of(
    strategy: type, args: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a strategy of Flower's by name, as they were given."""
    bound = inspect.signature(strategy).bind(*args, **options)
    return dict(bound.arguments)


def say_without_meaning(given: Mapping[str, Any], instead: Mapping[str, str]) -> None:
    """Log, once a strategy, which arguments change nothing here."""
    for name, what in instead.items():
        if name in given:
            log(INFO, "%s=%r has no meaning here: %s", name, given[name], what)
