"""Attacks under D2FT: by what hostile devices send of their parts of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float32Array
from lola_flwr.d2ft.wire import HIDDEN, SLOPES
from lola_flwr.device.asked import Arrays, PartResult
from lola_flwr.wire.packing import GRADIENTS, VALUES
from simulations.attacks.attack import D2FT, Attack, PartTurn
from simulations.attacks.lies import JOIN, claims_to_be_fastest

# Arrays of the replies, by the kind of the task that they are replies to.
_CONTRIBUTIONS = {"forward": (HIDDEN,)}
_SLOPES = {"backward": (SLOPES,), "loss": (SLOPES,)}
_GRADIENTS = {"backward": (SLOPES, GRADIENTS), "loss": (SLOPES, GRADIENTS)}
_OF_LOSSES = {"loss": (SLOPES, GRADIENTS)}
_VALUES = {"return": (VALUES,)}
_ALL = {"inputs": (HIDDEN,), **_CONTRIBUTIONS, **_GRADIENTS, **_VALUES}

# Values that the server lets pass, but no model has.
_FAR_OFF = 900.0
# Times the usual length, of gradients that are not taken for too long.
_JUST_BELOW = 1.9
# Sum of squares that a device says the gradient of each of its groups has.
_CLAIMED_SQUARES = 1e12

_Where = Mapping[str, tuple[str, ...]]
_Changed = dict[str, npt.NDArray[Any]]
_Change = Callable[[Float32Array, PartTurn], Float32Array]
_Part = Callable[[PartResult, PartTurn], PartResult]


def _arrays(where: _Where, change: _Change) -> Callable[[Arrays, PartTurn], _Changed]:
    """Return what changes some of the arrays that come with some kinds of tasks."""

    def changed(arrays: Arrays, turn: PartTurn) -> _Changed:
        names = where.get(turn.task.kind, ())
        return {
            name: change(array, turn).astype(np.float32) if name in names else array
            for name, array in arrays.items()
        }

    return changed


def _changed(where: _Where, change: _Change) -> _Part:
    """Return what changes such arrays of replies."""
    changed = _arrays(where, change)
    return lambda result, turn: (result[0], changed(result[1], turn))


def _turned(array: Float32Array, turn: PartTurn) -> Float32Array:
    return -array


def _times(where: _Where, factor: float) -> _Part:
    return _changed(where, lambda array, turn: array * factor)


def _noise(array: Float32Array, turn: PartTurn) -> Float32Array:
    """Draw what is nine times as long."""
    drawn = turn.rng("noise").standard_normal(array.shape).astype(np.float32)
    return 9.0 * drawn * np.float32(np.linalg.norm(array) / np.linalg.norm(drawn))


def _claimed_squares(result: PartResult, turn: PartTurn) -> PartResult:
    """Say that the own gradient is so long that all of the step is scaled down."""
    report, arrays = result
    squares = np.full(len(report.squares) // 8, _CLAIMED_SQUARES, "<f8")
    return replace(report, squares=squares.tobytes()), arrays


def _attack(name: str, part: _Part) -> Attack:
    return Attack(name=name, part=part, methods=(D2FT,))


_TURNED = _times(_CONTRIBUTIONS, -1.0)

PART_ATTACKS = (
    _attack("contributions turned round", _TURNED),
    _attack("contributions, 9.9 times", _times(_CONTRIBUTIONS, 9.9)),
    _attack("contributions of noise, 9 times", _changed(_CONTRIBUTIONS, _noise)),
    _attack("hidden states' gradients turned round", _times(_SLOPES, -1.0)),
    _attack("hidden states' gradients turned round, 9.9 times", _times(_SLOPES, -9.9)),
    # Just below what owners' gradients are scaled down from.
    _attack(
        "losses' gradients turned round, 1.9 times", _times(_OF_LOSSES, -_JUST_BELOW)
    ),
    _attack("all gradients turned round, 9.9 times", _times(_GRADIENTS, -9.9)),
    _attack("returned values turned round", _times(_VALUES, -1.0)),
    _attack(
        "returned values far off",
        _changed(
            _VALUES, lambda values, turn: np.where(values > 0, -_FAR_OFF, _FAR_OFF)
        ),
    ),
    # What it answers is as it should be: but for sub-networks, all goes back turned.
    Attack(
        name="sub-networks trained the wrong way",
        received=_arrays({"backward": (SLOPES,)}, _turned),
        part=_changed({"backward": (SLOPES, GRADIENTS)}, _turned),
        methods=(D2FT,),
    ),
    _attack("claims a huge gradient", _claimed_squares),
    _attack("parts of zeros", _times(_ALL, 0.0)),
    _attack(
        "parts of 3e38", _changed(_ALL, lambda array, turn: np.full_like(array, 3e38))
    ),
    replace(
        _attack("claims to be fastest, contributions turned round", _TURNED),
        profile=claims_to_be_fastest,
    ),
    replace(
        _attack("late sybils, contributions turned round", _TURNED),
        joins_at_round=JOIN,
    ),
)
