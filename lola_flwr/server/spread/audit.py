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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lola_flwr.d2ft.steps import StepSchedules
from lola_flwr.d2ft.wire import HIDDEN, MOMENTS, SLOPES, array_of
from lola_flwr.randomness import rng_for
from lola_flwr.server.spread.exchange import CheckedReply, LieFound, PartRequest
from lola_flwr.server.spread.model import Asked, SpreadModel
from lola_flwr.server.spread.places import Place
from lola_flwr.server.spread.returns import returned, returning, take_in
from lola_flwr.wire.packing import GRADIENTS, VALUES
from lola_flwr.wire.records import PartReport, PartTask

_Arrays = Mapping[str, npt.NDArray[Any]]

# Does what a task asks for, as a device does it.
Recompute = Callable[[PartTask, _Arrays], tuple[PartReport, _Arrays]]

# How far honest hardware is apart, in lengths of what is compared: float32 and bfloat16
# by 0.03 at most, in the seven families of models of the tests.
TOLERANCE = 0.1
# The same of the move that a step makes, there by 0.04: Adam's first are the signs of
# gradients, and rounding turns those of the smallest round.
MOVE_TOLERANCE = 0.5
# What is so small beside what it is computed from is rounding alone.
_ROUNDING = 1e-6
# Where dropout is drawn: nothing honest is further apart than this, nor than twice as
# far as the server's own draws. What is turned round is nearly 2.
_DRAWS_TOLERANCE = 1.5
_DRAWS_APART = 2.0
# Sums over tokens may cancel out in one draw, and are no longer than this many others.
_LONGEST_SUM = 10.0

_LENGTHS = "lengths"
_WHAT = {
    HIDDEN: "its contributions to",
    SLOPES: "its gradients of the hidden states of",
    GRADIENTS: "its gradients of shared parameters of",
    _LENGTHS: "its lengths of gradients of",
    VALUES: "its values, after a step of its own, of",
}


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

    def watch(
        self, step: int, places: Mapping[Place, str]
    ) -> dict[Place, dict[str, Asked]]:
        """Return the places that are audited in a step, with room for what is said.

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
        return {place: {} for place in watched}

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
        for place, said in spread.watched.items():
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
        far = _distance(
            held.arrays[VALUES] - start.values,
            own - start.values,
            _ROUNDING * _length(own),
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
        apart = {name: _distance(theirs[name], own[name], small[name]) for name in own}
        if all(far <= TOLERANCE for far in apart.values()):
            return True
        draws = [self._replies(said, held, seed + number) for number in (1, 2)]
        for name, far in apart.items():
            limit = _limit(name, own[name], [draw[name] for draw in draws], small[name])
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
    hidden = _length(said["forward"].request.arrays[HIDDEN])
    small = {HIDDEN: _ROUNDING * hidden}
    if "backward" in said:
        slopes = _length(said["backward"].request.arrays[SLOPES])
        product = _ROUNDING * slopes * hidden
        small |= {SLOPES: _ROUNDING * slopes, GRADIENTS: product, _LENGTHS: product}
    return small


def _limit(
    name: str,
    own: npt.NDArray[Any],
    draws: Sequence[npt.NDArray[Any]],
    small: float,
) -> float:
    """Return how far from the server's own an honest reply may be, by other draws."""
    apart = max(_distance(draw, own, small) for draw in draws)
    if not apart:
        return TOLERANCE  # nothing is drawn
    if name in (HIDDEN, SLOPES):
        return max(_DRAWS_TOLERANCE, _DRAWS_APART * apart)
    longest = max(map(_length, (own, *draws)))
    return _LONGEST_SUM * longest / max(_length(own), 1e-30)


def _length(array: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _distance(
    found: npt.NDArray[Any], expected: npt.NDArray[Any], small: float
) -> float:
    """Return how far two arrays are apart, in lengths of the one that is expected."""
    apart = _length(found - expected) - small
    length = _length(expected)
    if apart <= 0.0:
        return 0.0
    return apart / length if length else math.inf


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
