"""Spot checks: the server computes again what a device has computed of one place.

In a step that is drawn by lot one place of one device is audited. All that the device
was asked and answered in that step is kept; only when the answers are there is it asked
for the values that it computed with. The device's own code, run by the server on these
values, has to come to the same contributions, gradients of hidden states and lengths of
gradients. In the step after, the same place is audited again, and its values have to be
those that the server's own step makes of the ones before.

Honest devices differ by their hardware: by rounding, and, where dropout is drawn, by
their generators. How far rounding goes is known, and how far draws are apart the server
finds out by drawing again.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.d2ft.wire import (
    HIDDEN,
    MASKS,
    MOMENTS,
    SHARED,
    SLOPES,
    array_of,
    sizes_from_text,
)
from lola_flwr.randomness import rng_for
from lola_flwr.server.spread.exchange import CheckedReply, LieFound, PartRequest
from lola_flwr.server.spread.held import HeldValues
from lola_flwr.server.spread.model import SpreadModel
from lola_flwr.server.spread.places import Place
from lola_flwr.server.spread.returns import returned, returning, take_in
from lola_flwr.server.spread.tolerances import (
    MOVE_TOLERANCE,
    STEP_TOLERANCE,
    TOLERANCE,
    difference,
    distance,
    length,
    limit_of_draws,
)
from lola_flwr.wire.packing import GRADIENTS, VALUES
from lola_flwr.wire.records import PartReport, PartTask

_Arrays = Mapping[str, npt.NDArray[Any]]

# Gives a micro-batch: (number, examples) -> arguments of the model.
Draw = Callable[[int, int], Mapping[str, Tensor]]


class Recompute(Protocol):
    """Does what a task asks for, as a device does it."""

    def __call__(
        self, task: PartTask, arrays: _Arrays, draw: Draw = ..., /
    ) -> tuple[PartReport, _Arrays]:
        """Compute it; ``draw`` gives the examples, where it takes any."""


# What is so small beside what it is computed from is rounding alone.
_ROUNDING = 1e-6
# Contributions that are apart by less than this part of their inputs do no harm.
_HARMLESS = 0.1

_LENGTHS = "lengths"
_WHAT = {
    HIDDEN: "its contributions to",
    SLOPES: "its gradients of the hidden states of",
    GRADIENTS: "its gradients of shared parameters of",
    _LENGTHS: "its lengths of gradients of",
    VALUES: "its values, after a step of its own, of",
}


@dataclass(frozen=True, eq=False)
class Asked:
    """What a device was asked, and what it replied."""

    request: PartRequest
    reply: CheckedReply


@dataclass(frozen=True, eq=False)
class _Contributed:
    """What a place was asked to contribute to one micro-batch, and its contribution."""

    task: PartTask
    arrays: _Arrays
    found: npt.NDArray[Any]

    @classmethod
    def of(cls, request: PartRequest, reply: CheckedReply) -> _Contributed:
        """Take the first micro-batch of a forward pass."""
        task, arrays = request.task, request.arrays
        tokens = [examples * each for examples, each in sizes_from_text(task.sizes)]
        size = arrays[HIDDEN].size // sum(tokens) * tokens[0]
        (found,) = reply.tensors(HIDDEN, [arrays[HIDDEN].shape], largest=math.inf)
        firsts = {n: getattr(task, n).split()[0] for n in ("numbers", "rows", "sizes")}
        first = {
            **{name: arrays[name] for name in (SHARED,) if name in arrays},
            HIDDEN: arrays[HIDDEN][:size].copy(),
            MASKS: arrays[MASKS][: tokens[0]].copy(),
        }
        return cls(replace(task, **firsts), first, found.numpy()[:size].copy())


class _Held(NamedTuple):
    """What a place holds in a step: as arrays, what steps it, and who has just said."""

    arrays: _Arrays
    told: str = ""
    reply: CheckedReply | None = None


@dataclass(frozen=True, eq=False)
class _Start:
    """What a step of the server's own begins with: its number, and the values."""

    step: int
    values: npt.NDArray[Any]


class Auditor:
    """Draws who is audited, and finds who lies.

    Parameters
    ----------
    recompute
        Does what a device would; what it keeps for another trainer's number is dropped.
    schedules
        Say in which part of the steps a place is drawn, and by which seed.
    """

    def __init__(self, recompute: Recompute, schedules: StepSchedules) -> None:
        self._recompute = recompute
        self._share = schedules.audit_share
        seed = schedules.audit_seed
        self._seed = secrets.randbits(62) if seed is None else seed
        self._starts: dict[Place, _Start] = {}
        self._watched: dict[Place, dict[str, Asked]] = {}
        self._last: dict[Place, _Contributed] = {}

    @property
    def recompute(self) -> Recompute | None:
        """Does what a device would; None where nobody is audited."""
        return self._recompute if self._share else None

    def watch(self, step: int, places: Mapping[Place, str]) -> None:
        """Choose the places that are audited in a step.

        Parameters
        ----------
        step
            The step.
        places
            What each device is to hold.
        """
        watched = [place for place in self._starts if place in places]
        rng = rng_for(self._seed, "audit", step)
        if rng.random() < self._share:
            # Whoever holds little is audited as often as who holds much.
            devices = [*dict.fromkeys(places.values())]
            drawn = devices[rng.integers(len(devices))]
            own = [place for place, device in places.items() if device == drawn]
            watched.append(own[rng.integers(len(own))])
        self._watched = {place: {} for place in watched}
        self._last = {p: last for p, last in self._last.items() if p in places}

    def note(self, request: PartRequest, reply: CheckedReply) -> None:
        """Keep what is said of the places that are audited, and a bit of the others."""
        place, kind = Place.of(request.task), request.task.kind
        if place in self._watched:
            self._watched[place][kind] = Asked(request, reply)
        if kind == "forward" and self._share:
            self._last[place] = _Contributed.of(request, reply)

    def doubt(self, held: HeldValues, place: Place, reply: CheckedReply) -> None:
        """Compare values that are returned with what their place contributed last.

        A step lies between the two, so that all but a lie passes, and the device that
        lies rests only.

        Raises
        ------
        PartFailed
            The values would contribute something else altogether.
        """
        last = self._last.get(place)
        if last is None or last.task.version + 1 < held.version:
            return
        values, _ = returned(held, place, reply, moments=False)
        state, told = held.content(place)
        state[VALUES] = array_of(values)

        task = replace(
            last.task,
            gradient_step=0,
            optimizer=told,
            trainer_id=secrets.randbits(62),  # nothing is to be kept
        )
        _, own = self._recompute(task, {**last.arrays, **state})
        small = _HARMLESS * length(last.arrays[HIDDEN])
        far = difference(last.found, own[HIDDEN], small)
        if not far <= STEP_TOLERANCE:
            raise reply.failure(
                f"the values that it returns of {place} contribute what is {far:.3g} "
                f"lengths from what it did before, honest ones {STEP_TOLERANCE:g}"
            )

    def check(self, spread: SpreadModel) -> None:
        """Audit what was watched of a step, before it is taken.

        Raises
        ------
        LieFound
            What a device said is not what comes of what it was asked.
        PartFailed
            It does not return the values that it must have computed with.
        """
        starts, self._starts = self._starts, {}
        for place, said in self._watched.items():
            if "forward" not in said:
                continue  # it had nothing to do
            # Its step from here is checked in the next one, and begins with moments.
            begins = place not in starts
            held = _held(spread, place, said["forward"].request, moments=begins)
            if place in starts:
                self._check_move(spread, place, starts[place], held)
            is_exact = self._check_replies(spread, place, said, held)
            if held.reply is not None:
                take_in(spread.held, place, held.reply, moments=begins)
            spread.held.confirm(place)
            # With dice of another kind its step is another, too.
            if begins and is_exact and VALUES in held.arrays:
                self._starts[place] = _Start(spread.task.step, held.arrays[VALUES])

    def _check_move(
        self, spread: SpreadModel, place: Place, start: _Start, held: _Held
    ) -> None:
        """Compare the values with what a step of the server's own makes of the last."""
        task = returning(spread.held, spread.task, place, moments=False)
        if task.gradient_step < start.step:
            task = replace(task, gradient_step=0)  # the values began with that
        report, arrays = self._recompute(replace(task, trainer_id=start.step), {})
        if report.lacks:
            return  # it has been sent them anew
        own = arrays[VALUES]
        far = distance(
            held.arrays[VALUES] - start.values,
            own - start.values,
            _ROUNDING * length(own),
        )
        if not far <= MOVE_TOLERANCE:
            raise _lie(spread, place, VALUES, far, MOVE_TOLERANCE)

    def _check_replies(
        self, spread: SpreadModel, place: Place, said: Mapping[str, Asked], held: _Held
    ) -> bool:
        """Compare the replies with the server's own; tell whether they are the same."""
        seed, small = spread.task.seed, _small(said)
        own = self._replies(said, held, seed)
        theirs = _said(said, own)
        apart = {name: distance(theirs[name], own[name], small[name]) for name in own}
        if all(far <= TOLERANCE for far in apart.values()):
            return True
        draws = [self._replies(said, held, seed + number) for number in (1, 2)]
        for name, far in apart.items():
            others, limit = [draw[name] for draw in draws], TOLERANCE
            if any(distance(other, own[name], small[name]) for other in others):
                far = difference(theirs[name], own[name], small[name])
                is_sum = name not in (HIDDEN, SLOPES)
                limit = limit_of_draws(own[name], others, is_sum=is_sum)
            if not far <= limit:  # nor is NaN
                raise _lie(spread, place, name, far, limit)
        return False

    def _replies(
        self, said: Mapping[str, Asked], held: _Held, seed: int
    ) -> dict[str, npt.NDArray[Any]]:
        """Compute what a device is to reply, with dropout by some seed."""

        def reply(kind: str) -> tuple[PartReport, _Arrays]:
            task, arrays = said[kind].request.task, said[kind].request.arrays
            task = replace(
                task,
                seed=seed,
                gradient_step=0,  # the values begin with it
                trainer_id=task.step,
                optimizer=held.told,
            )
            return self._recompute(task, {**arrays, **held.arrays})

        _, arrays = reply("forward")
        own = {HIDDEN: arrays[HIDDEN]}
        if "backward" in said:
            report, arrays = reply("backward")
            lengths = np.sqrt(np.frombuffer(report.squares, "<f8"))
            own |= {**arrays, _LENGTHS: lengths}
        return own


def _held(
    spread: SpreadModel, place: Place, request: PartRequest, *, moments: bool
) -> _Held:
    """Return what a place holds in a step, as the server knows it or is told.

    Without the moments that it has, these are what the server last knew.
    """
    held, device = spread.held, spread.places[place]
    if not held.slices(place).own:
        return _Held({})
    if VALUES in request.arrays:
        sent = request.arrays
        arrays = {name: sent[name] for name in (VALUES, MOMENTS) if name in sent}
        return _Held(arrays, request.task.optimizer)
    arrays, told = held.content(place)
    if not held.unknown([place], moments=moments):
        return _Held(arrays, told)
    task = returning(held, spread.task, place, moments=moments)
    reply = spread.ask({device: PartRequest(task)})[device]
    values, beside = returned(held, place, reply, moments=moments)
    arrays[VALUES] = array_of(values)
    if beside is not None:
        arrays[MOMENTS] = array_of(beside)
    return _Held(arrays, told, reply)


def _said(
    said: Mapping[str, Asked], own: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Return what a device replied, where the server's own replies are these."""
    found: dict[str, npt.NDArray[Any]] = {}
    for name, array in own.items():
        reply = said["forward" if name == HIDDEN else "backward"].reply
        if name == _LENGTHS:
            found[name] = np.sqrt(reply.squares(array.size, math.inf))
        else:
            (tensor,) = reply.tensors(name, [array.shape], largest=math.inf)
            found[name] = tensor.numpy()
    return found


def _small(said: Mapping[str, Asked]) -> dict[str, float]:
    """Return lengths of replies that are rounding, beside what they are made of."""
    hidden = length(said["forward"].request.arrays[HIDDEN])
    small = {HIDDEN: _ROUNDING * hidden}
    if "backward" in said:
        slopes = length(said["backward"].request.arrays[SLOPES])
        product = _ROUNDING * slopes * hidden
        small |= {SLOPES: _ROUNDING * slopes, GRADIENTS: product, _LENGTHS: product}
    return small


def _lie(
    spread: SpreadModel, place: Place, name: str, far: float, limit: float
) -> LieFound:
    """Return the error that says who lied, about what, and how far it is off."""
    return LieFound(
        {
            spread.places[place]: f"{_WHAT[name]} {place} are {far:.3g} of their "
            f"length away from what the server computes, honest ones {limit:.2g} at "
            "most; it is excluded from this run"
        }
    )
