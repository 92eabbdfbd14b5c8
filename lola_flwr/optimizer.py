"""A training step: an optimizer of torch.optim, and the values that it steps.

The server steps the model with it, or where the model is spread over devices, each of
these what it holds of it.
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lola_flwr.arrays import Float32Arrays, in_one
from lola_flwr.errors import UserError
from lola_flwr.run.checkpoint import Snapshot


class ServerOptimizer:
    """Holds the model's trainable values and steps them.

    Parameters
    ----------
    state
        Initial values by parameter name; copied.
    optimizer
        Name of a class of ``torch.optim``.
    linear_decay_steps
        Let the learning rate fall linearly, to zero after this many steps (default: it
        stays).
    schedule
        Name of a class of ``torch.optim.lr_scheduler``, stepped once a round, in place
        of the linear decay.
    schedule_options
        Its keyword arguments: ``{"T_max": 40}``.
    **options
        The optimizer's keyword arguments: ``lr=3e-4``. Where it has a fused step, that
        is taken, unless they say otherwise.

    Attributes
    ----------
    flat
        All values one after the other, in the order of their sorted names, as a view.

    Raises
    ------
    UserError
        No such optimizer or schedule, or options that it refuses.
    """

    def __init__(
        self,
        state: Mapping[str, npt.NDArray[np.float32]],
        *,
        optimizer: str = "AdamW",
        linear_decay_steps: int | None = None,
        schedule: str | None = None,
        schedule_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        factory = getattr(torch.optim, optimizer, None)
        if not (
            isinstance(factory, type) and issubclass(factory, torch.optim.Optimizer)
        ):
            raise UserError(
                f"optimizer={optimizer!r} is not an optimizer of torch.optim; try "
                "'AdamW' or 'SGD'."
            )
        self.arguments: dict[str, Any] = {
            "optimizer": optimizer,
            "linear_decay_steps": linear_decay_steps,
            "schedule": schedule,
            "schedule_options": dict(schedule_options or {}),
            **options,
        }
        self.flat, self._values = in_one(state)
        self._parameters = {
            name: torch.nn.Parameter(torch.from_numpy(values))
            for name, values in self._values.items()
        }
        factory = _without_compiler(factory)
        try:
            # Some optimizers can be made, but not stepped with a dense gradient alone.
            trial, self._changes_gradients = _tried(factory, options)
            if _offers_fused(factory, options):
                options = {**options, "fused": True}
            self._optimizer = factory(self._parameters.values(), **options)
        # What an option that is wrong makes of an optimizer's own code can be anything.
        except Exception as error:
            raise UserError(f"optimizer={optimizer!r}: {error}") from None
        if schedule is None:
            steps = linear_decay_steps
            self._schedule: LRScheduler = LambdaLR(
                self._optimizer,
                lambda step: 1.0 if steps is None else max(0.0, 1.0 - step / steps),
            )
        else:
            given = schedule_options or {}
            # Nor can all schedules that can be made be stepped.
            _schedule_named(schedule, trial, given, steps=1)
            self._schedule = _schedule_named(schedule, self._optimizer, given)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self._schedule.last_epoch)

    def like(self, state: Mapping[str, npt.NDArray[np.float32]]) -> ServerOptimizer:
        """Return an optimizer of other values, made with the same arguments."""
        return ServerOptimizer(state, **self.arguments)

    def step(
        self, gradient: Mapping[str, npt.NDArray[np.float32]], server_round: int = 1
    ) -> None:
        """Take one step; parameters without a gradient keep their values.

        Parameters
        ----------
        gradient
            Gradients by name; an optimizer that would change them is given copies.
        server_round
            Round, from 1; no optimizer of torch.optim asks for it.
        """
        with warnings.catch_warnings():
            # A device's bytes cannot be written to, nor will they be.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            for name, parameter in self._parameters.items():
                values = gradient.get(name)
                if values is None:
                    parameter.grad = None
                    continue
                values = np.asarray(values, np.float32)
                if self._changes_gradients:
                    values = values.copy()
                parameter.grad = torch.from_numpy(values)
        with torch.no_grad():
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()

    def shift(self, moves: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Move some parameters past the optimizer; its moments stay.

        Parameters
        ----------
        moves
            What is added to the parameters of these names.
        """
        with torch.no_grad():
            for name, move in moves.items():
                self._parameters[name].add_(torch.from_numpy(move))

    def load(self, values: Mapping[str, npt.NDArray[np.floating]]) -> None:
        """Overwrite the values; the optimizer's moments stay.

        Parameters
        ----------
        values
            New value of every parameter; other names are ignored.
        """
        for name, own in self._values.items():
            own[...] = values[name]

    def snapshot(self) -> Snapshot:
        """Return values, moments and the schedule's place, as views."""
        held = self._optimizer.state_dict()
        arrays = {f"model/{name}": values for name, values in self.state().items()}
        for index, entries in held["state"].items():
            for key, value in entries.items():
                arrays[f"optimizer/{index}/{key}"] = value.numpy(force=True)
        return Snapshot(
            arrays,
            {"steps": self._schedule.last_epoch, "groups": held["param_groups"]},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot, in an optimizer made with the same arguments.

        Raises
        ------
        UserError
            The snapshot is of other parameters.
        """
        values, state = {}, defaultdict[int, dict[str, Any]](dict)
        for name, array in snapshot.arrays.items():
            owner, _, rest = name.partition("/")
            if owner == "model":
                values[rest] = array
            elif owner == "optimizer":
                index, _, key = rest.partition("/")
                state[int(index)][key] = torch.tensor(array)
        own = {name: v.shape for name, v in self.state().items()}
        if own != {name: v.shape for name, v in values.items()}:
            raise UserError(
                "The checkpoint holds other parameters than this model trains; use the "
                "model and the method that it was made with."
            )
        self.load(values)
        # A schedule is a function of the steps taken, so they are taken again: what it
        # keeps between them is not all fit for JSON.
        _take_steps(self._schedule, snapshot.values["steps"])
        self._optimizer.load_state_dict(
            {"state": state, "param_groups": snapshot.values["groups"]}
        )

    def moments(self, names: Iterable[str]) -> dict[str, Float32Arrays]:
        """Return what is kept beside values, one number for each of them, as views.

        By the parameter's name, and their own. Of one that was never stepped it is what
        a step without gradient leaves.
        """
        known = self._optimizer.state
        wanted = {name: self._parameters[name] for name in names}
        new = {n: p for n, p in wanted.items() if p not in known}
        if new:
            fresh = self.like({n: p.detach().numpy() for n, p in new.items()})
            fresh.step({n: np.zeros(p.shape, np.float32) for n, p in new.items()})
            for name, parameter in new.items():
                known[parameter] = fresh._optimizer.state[fresh._parameters[name]]
        return {
            name: {
                key: value.numpy()
                for key, value in sorted(known[parameter].items())
                if value.dim()
            }
            for name, parameter in wanted.items()
        }

    def counts(self, name: str) -> dict[str, float]:
        """Return the single numbers that are kept beside a parameter's values."""
        entries = self._optimizer.state[self._parameters[name]]
        return {key: float(v) for key, v in entries.items() if not v.dim()}

    def set_counts(self, names: Iterable[str], counts: Mapping[str, float]) -> None:
        """Set those numbers of some parameters that have been stepped."""
        for name in names:
            entries = self._optimizer.state[self._parameters[name]]
            for key, value in counts.items():
                entries[key].fill_(value)

    def go_on(
        self,
        steps: int,
        moments: Mapping[str, Float32Arrays],
        counts: Mapping[str, float],
    ) -> None:
        """Go on as after some steps, with the moments that they left.

        Parameters
        ----------
        steps
            Steps that the schedule has taken.
        moments
            By parameter, as `moments` returns them.
        counts
            As `counts` returns them: the same for all of these parameters.
        """
        _take_steps(self._schedule, steps - self.steps)
        held = self._optimizer.state_dict()
        numbers = {name: index for index, name in enumerate(self._parameters)}
        for name, entries in moments.items():
            held["state"][numbers[name]] = {
                key: torch.tensor(value) for key, value in {**entries, **counts}.items()
            }
        self._optimizer.load_state_dict(held)

    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the current values by name, as views: the next step changes them."""
        return {name: values[...] for name, values in self._values.items()}


def require_elementwise(optimizer: ServerOptimizer) -> None:
    """Refuse an optimizer that does not step each value by itself.

    Raises
    ------
    UserError
        Stepped in two parts a matrix comes out otherwise than in one.
    """
    rng = np.random.default_rng(0)
    start, *gradients = rng.normal(size=(4, 6, 8)).astype(np.float32)
    whole = optimizer.like({"both": start})
    parts = optimizer.like({"left": start[:, :3], "right": start[:, 3:]})
    for gradient in gradients:
        whole.step({"both": gradient.copy()})
        parts.step({"left": gradient[:, :3].copy(), "right": gradient[:, 3:].copy()})
    together = np.concatenate([parts.state()["left"], parts.state()["right"]], axis=1)
    if not np.allclose(together, whole.state()["both"], rtol=1e-4, atol=1e-7):
        raise UserError(
            f"optimizer={optimizer.arguments['optimizer']!r} steps matrices as a "
            "whole, and devices hold parts of them; choose one that steps each value "
            "by itself, such as 'AdamW' or 'SGD'."
        )


def _without_compiler(
    factory: type[torch.optim.Optimizer],
) -> type[torch.optim.Optimizer]:
    """Derive an optimizer whose methods do not load PyTorch's compiler.

    PyTorch wraps them so that ``torch.compile`` leaves them alone, and the wrappers
    load it to say so: 70 MiB and 2 s, for a compiler that the server never runs.
    Without its wrapper, ``step`` has to be called under ``torch.no_grad``.
    """
    wrapped = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
    methods = {name: inspect.unwrap(getattr(factory, name)) for name in wrapped}
    return type(factory.__name__, (factory,), methods)


def _offers_fused(
    factory: type[torch.optim.Optimizer], options: Mapping[str, Any]
) -> bool:
    """Tell whether there is a step in one pass over the memory, equal to rounding."""
    chosen = {"fused", "foreach", "capturable", "differentiable"} & {*options}
    if chosen or "fused" not in inspect.signature(factory).parameters:
        return False
    try:
        _tried(factory, {**options, "fused": True})
    # With some options it is refused, by errors of several types.
    except (RuntimeError, ValueError, TypeError):
        return False
    return True


def _tried(
    factory: type[torch.optim.Optimizer], options: Mapping[str, Any]
) -> tuple[torch.optim.Optimizer, bool]:
    """Step an optimizer once; return it, and whether it has changed its gradient."""
    probe = torch.nn.Parameter(torch.ones(1))
    probe.grad = torch.ones(1)
    trial = factory([probe], **options)
    with torch.no_grad():
        trial.step()
    return trial, probe.grad is None or probe.grad.item() != 1.0


def _schedule_named(
    name: str,
    optimizer: torch.optim.Optimizer,
    options: Mapping[str, Any],
    steps: int = 0,
) -> LRScheduler:
    """Return the schedule of that name after some steps."""
    factory = getattr(lr_scheduler, name, None)
    if not (
        isinstance(factory, type)
        and issubclass(factory, LRScheduler)
        # This one is steered by a metric, and steps know of none.
        and factory is not lr_scheduler.ReduceLROnPlateau
    ):
        raise UserError(
            f"schedule={name!r} is not a schedule of torch.optim.lr_scheduler that "
            "counts steps; try 'CosineAnnealingLR' or 'StepLR'."
        )
    try:
        schedule: LRScheduler = factory(optimizer, **options)
        _take_steps(schedule, steps)
    except Exception as error:
        raise UserError(f"schedule={name!r}: {error}") from None
    return schedule


def _take_steps(schedule: LRScheduler, steps: int) -> None:
    """Let a schedule go on alone."""
    with warnings.catch_warnings():
        # It would like the optimizer to be stepped between its own steps.
        warnings.simplefilter("ignore")
        for _ in range(steps):
            schedule.step()
