"""Attacks by what gradients are sent."""

from __future__ import annotations

import math

import numpy as np

from lola_flwr.arrays import Float32Arrays
from simulations.attacks.attack import Attack, Turn, norm_of, scaled

# Of a seeded direction that all hostile devices send.
_SHARED = "shared direction"
# How many standard deviations "a little" is where a fifth of the devices is hostile.
_LITTLE = 1.5
# Rounds in which a sleeper is honest.
_SLEEPS = 40


def _times(factor: float) -> Attack:
    name = "sign flip" if factor == -1 else f"sign flip, {-factor:g} times"
    return Attack(name=name, gradients=lambda honest, turn: scaled(honest, factor))


def _alternating(honest: Float32Arrays, turn: Turn) -> Float32Arrays:
    return honest if turn.times_asked % 2 else scaled(honest, -9.9)


def _drawn(honest: Float32Arrays, *purpose: str | int, turn: Turn) -> Float32Arrays:
    """Draw a direction, as long as the gradients."""
    rng = turn.rng(*purpose)
    drawn = {
        name: rng.standard_normal(honest[name].shape).astype(np.float32)
        for name in sorted(honest)
    }
    return scaled(drawn, norm_of(honest) / norm_of(drawn))


def _shared(honest: Float32Arrays, turn: Turn) -> Float32Arrays:
    block = turn.assignment.block_index
    return scaled(_drawn(honest, _SHARED, block, turn=turn), 5.0)


def _noise(honest: Float32Arrays, turn: Turn) -> Float32Arrays:
    drawn = _drawn(honest, "noise", turn.server_round, turn.device, turn=turn)
    return scaled(drawn, 9.0)


def _little(honest: Float32Arrays, turn: Turn) -> Float32Arrays:
    """Stay within the spread of honest gradients in each coordinate, on one side."""
    sent = {}
    for name, gradient in honest.items():
        seen = np.stack([*turn.gang.honest[name], gradient])
        mean, deviation = seen.mean(axis=0), seen.std(axis=0)
        sent[name] = mean - _LITTLE * deviation * np.sign(mean)
    return sent


def _inner_product(honest: Float32Arrays, turn: Turn) -> Float32Arrays:
    """Send the gang's mean gradient turned round, of an honest one's length."""
    means = {
        name: np.stack([*turn.gang.honest[name], gradient]).mean(axis=0)
        for name, gradient in honest.items()
    }
    length = norm_of(means)
    return scaled(means, -norm_of(honest) / length) if length else honest


def _below_limit(honest: Float32Arrays, turn: Turn) -> Float32Arrays:
    """Turn the block's gradient round, at its usual length; be honest about the head.

    Of the head's, every device of a round sends one, and they can be compared.
    """
    head = set(turn.gang.partition.head)
    usual = np.median(turn.gang.norms[turn.assignment.block_index])
    block = {name: g for name, g in honest.items() if name not in head}
    rest = {name: g for name, g in honest.items() if name in head}
    length = norm_of(block)
    wanted = math.sqrt(max(usual**2 - norm_of(rest) ** 2, length**2 / 4))
    return {**rest, **scaled(block, -wanted / length if length else 1.0)}


def _along_the_way(honest: Float32Arrays, turn: Turn) -> Float32Arrays:
    """Turn the gradient round, but for its part along the model's latest move.

    Whoever compares directions with the block's momentum sees an honest device.
    """
    if len(turn.gang.values) < 2:
        return scaled(honest, -1.0)
    before, now = turn.gang.values
    # Steps go against the gradient.
    way = {name: before[name] - now[name] for name in honest}
    length = norm_of(way)
    if not length:
        return scaled(honest, -1.0)
    along = sum(float((honest[n] * way[n]).sum()) for n in honest) / length**2
    turned = {n: 2 * along * way[n] - honest[n] for n in honest}
    return {n: g.astype(np.float32) for n, g in turned.items()}


def _sleeper(honest: Float32Arrays, turn: Turn) -> Float32Arrays:
    return honest if turn.server_round <= _SLEEPS else scaled(honest, -1.0)


GRADIENT_ATTACKS = (
    _times(-1.0),
    _times(-9.9),
    _times(-30.0),
    Attack(name="alternating, 9.9 times", gradients=_alternating),
    Attack(name="shared direction, 5 times", gradients=_shared),
    Attack(name="noise, 9 times", gradients=_noise),
    Attack(name="a little is enough", gradients=_little),
    Attack(name="inner product manipulation", gradients=_inner_product),
    Attack(name="adaptive: usual length, honest head", gradients=_below_limit),
    Attack(name="adaptive: along the model's move", gradients=_along_the_way),
    Attack(name="adaptive: sleeper", gradients=_sleeper),
)
