"""Random generators that are functions of what they are drawn for.

A generator is derived from the run's seed and the purpose, round and device it serves,
never from how often something was drawn before: a resumed run, or one in which a device
left, draws the same numbers as an unbroken one.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np


def rng_for(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the generator for one purpose of a run.

    Parameters
    ----------
    seed
        Seed of the run, at least 0.
    *purpose
        What the numbers are for: ``rng_for(7, "fading", 3, "device-1")``.

    Returns
    -------
    numpy.random.Generator
        Equal for equal arguments. Words are hashed, so a number and its digits are the
        same purpose.
    """
    key = [crc32(str(part).encode()) for part in purpose]
    return np.random.default_rng([seed, *key])
