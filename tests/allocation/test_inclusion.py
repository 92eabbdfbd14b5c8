"""Which components are drawn: every probability is kept, and nothing is biased."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import minimize

from lola_flwr.allocation import (
    drawn_components,
    inclusion_probabilities,
    sampling_noise,
)

SQUARES = {
    "alike": np.ones(8),
    "some": np.array([9.0, 1.0, 4.0, 0.25, 1.0, 0.0, 16.0, 2.0]),
    "one": np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
    "none": np.zeros(8),
    "tiny": np.full(8, 1e-40),
    "spread": 10.0 ** np.arange(-12, 12, 3),
}


def every_draw(probability):
    """Give all draws that there are, each with how much of [0, 1) leads to it."""
    ends = np.cumsum(probability[probability < 1 - 1e-9]) % 1.0
    cuts = np.unique(np.concatenate([[0.0, 1.0], ends]))
    for low, high in pairwise(cuts):
        if high - low > 1e-9:
            yield drawn_components(probability, (low + high) / 2), high - low


@pytest.mark.parametrize("name", SQUARES)
@pytest.mark.parametrize("rank", range(1, 9))
def test_what_is_drawn_is_right_in_the_mean(name, rank):
    """By enumeration of all draws: the expected gradient is that of all components."""
    probability = inclusion_probabilities(SQUARES[name], rank)
    gradient = np.random.default_rng(rank).standard_normal((8, 5))
    chance, mean, square = np.zeros(8), np.zeros_like(gradient), 0.0
    for drawn, weight in every_draw(probability):
        assert len({*drawn.tolist()}) == rank
        assert (np.diff(drawn) > 0).all()
        estimate = np.zeros_like(gradient)
        estimate[drawn] = gradient[drawn] / probability[drawn, None]
        chance[drawn] += weight
        mean += weight * estimate
        square += weight * np.square(estimate).sum()
    np.testing.assert_allclose(chance, probability, atol=1e-7)
    np.testing.assert_allclose(mean, gradient, atol=1e-6 * 32)
    own = np.square(gradient).sum(axis=1)
    noise = sampling_noise(own, probability)
    assert square == pytest.approx(noise * own.sum(), rel=1e-6)


@pytest.mark.parametrize("name", SQUARES)
@pytest.mark.parametrize("rank", range(1, 9))
def test_no_component_is_forgotten(name, rank):
    probability = inclusion_probabilities(SQUARES[name], rank)
    assert probability.sum() == pytest.approx(rank, abs=1e-9)
    assert probability.min() >= rank / 32 - 1e-12
    assert probability.max() <= 1.0


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_no_other_probabilities_are_less_noisy(rank):
    square = SQUARES["some"][:6] + 0.1
    own = sampling_noise(square, inclusion_probabilities(square, rank))
    found = minimize(
        lambda p: sampling_noise(square, p),
        np.full(6, rank / 6),
        bounds=[(rank / 24, 1.0)] * 6,
        constraints={"type": "eq", "fun": lambda p: p.sum() - rank},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert own == pytest.approx(found.fun, rel=1e-5)


def test_all_of_them_are_certain():
    probability = inclusion_probabilities(SQUARES["some"], 8)
    np.testing.assert_array_equal(probability, np.ones(8))
    np.testing.assert_array_equal(drawn_components(probability, 0.7), np.arange(8))
    assert sampling_noise(SQUARES["some"], probability) == 1.0


def test_a_comb_at_the_very_end_meets_as_many():
    for rank in range(1, 8):
        probability = inclusion_probabilities(np.ones(8), rank)
        drawn = drawn_components(probability, np.nextafter(1.0, 0.0))
        assert len({*drawn.tolist()}) == rank


def test_more_than_there_are_cannot_be_drawn():
    for rank in (0, 9):
        with pytest.raises(ValueError, match=f"{rank} of 8 components"):
            inclusion_probabilities(np.ones(8), rank)
