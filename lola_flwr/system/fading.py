"""How links fade: the power gain of each device's link when a round begins.

A gain ``|h|^2`` has the mean 1 and holds for the round (block fading). Its complex
amplitude ``h`` is that of many paths, circular Gaussian, so that ``|h|^2 ~ Exp(1)``,
which is Rayleigh fading; models differ in what rounds have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import Float64Array
from lola_flwr.randomness import rng_for
from lola_flwr.system.own_channel import Moment

Fading = Literal["rayleigh", "none", "gauss-markov"]

# Coherence times after which nothing is left of a gain, as far as numbers go: exp(-32);
# and in how many steps they are divided, each of 1/128.
_STRETCH = 32.0
_STEPS = 2**12


def power_gain(
    fading: Fading, names: Sequence[str], moment: Moment, *, coherence_s: float
) -> Float64Array:
    """Return the power gain of each device's link at a moment, shape [K].

    Parameters
    ----------
    fading
        ``"none"``: it is 1. ``"rayleigh"``: it is drawn anew for each round.
        ``"gauss-markov"``: it changes with time, see `gauss_markov_gain`.
    names
        Names of the K devices. A device's gain depends on its name, the moment and the
        seed alone, not on which other devices are there.
    moment
        When the round begins.
    coherence_s
        For ``"gauss-markov"``.
    """
    if fading == "none":
        return np.ones(len(names))
    if fading == "gauss-markov":
        return gauss_markov_gain(names, moment, coherence_s=coherence_s)
    return rayleigh_gain(names, moment)


def rayleigh_gain(names: Sequence[str], moment: Moment) -> Float64Array:
    """Draw the gains of one round, independent of all others', shape [K].

    The system model of arXiv:2407.09873.
    """
    return np.array(
        [
            rng_for(moment.seed, "fading", moment.server_round, name).exponential()
            for name in names
        ]
    )


def gauss_markov_gain(
    names: Sequence[str], moment: Moment, *, coherence_s: float
) -> Float64Array:
    """Return gains that are alike at times that are close, shape [K].

    The amplitude is a first-order Gauss-Markov process (as in Dong, Tong, Sadler,
    "Optimal insertion of pilot symbols for transmissions over time-varying flat fading
    channels", IEEE Transactions on Signal Processing 52(5), 2004): from one round to
    the next ``h' = a h + sqrt(1 - a^2) w`` with new noise ``w`` and
    ``a = exp(-seconds between them / coherence_s)``.

    Parameters
    ----------
    names, moment
        As for `power_gain`.
    coherence_s
        Time after which the correlation of amplitudes has fallen to 1/e, seconds; that
        of power gains then is 1/e^2.

    Notes
    -----
    A run that goes on knows the time, and not what was drawn before. So the process is
    drawn from the ends of a stretch of time inwards: given two of its values, the one
    halfway between depends on nothing else (Doob, "The Brownian movement and stochastic
    equations", Annals of Mathematics 43(2), 1942), and each has a draw of its own. The
    ends of stretches are independent, 32 coherence times apart.
    """
    time = moment.time_s / coherence_s
    return np.array([abs(_amplitude(moment.seed, name, time)) ** 2 for name in names])


def _amplitude(seed: int, name: str, time: float) -> complex:
    """Return a device's amplitude at a time, in coherence times."""
    stretch, within = divmod(time, _STRETCH)
    place = int(within / _STRETCH * _STEPS)
    begin, end = 0, _STEPS
    drawn = _amplitudes(seed, name, int(stretch), _STEPS)
    first, last = drawn[0], _amplitudes(seed, name, int(stretch) + 1, 1)[0]
    while begin < place:
        middle = (begin + end) // 2
        a = math.exp(-(middle - begin) * _STRETCH / _STEPS)
        known = a / (1 + a * a) * (first + last)
        new = math.sqrt((1 - a * a) / (1 + a * a))
        halfway = known + new * drawn[middle]
        if place < middle:
            end, last = middle, halfway
        else:
            begin, first = middle, halfway
    return complex(first)


def _amplitudes(
    seed: int, name: str, stretch: int, count: int
) -> npt.NDArray[np.complex128]:
    """Draw what is new at a stretch's first steps: unit amplitudes, shape [count]."""
    rng = rng_for(seed, "gauss-markov", name, stretch)
    parts = rng.standard_normal((count, 2)) * math.sqrt(0.5)
    return np.asarray(parts[:, 0] + 1j * parts[:, 1])
