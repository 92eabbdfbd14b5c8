from __future__ import annotations

import math

import pytest

from lola_flwr.zeroth_order.forward_mode import directional_derivatives
from lola_flwr.zeroth_order.projections import projected_gradients
from simulations.attacks.small import SmallTask, small_model
from simulations.benchmarks import forward_gap
from simulations.benchmarks.forward_gap import (
    Way,
    best_losses,
    directions_for,
    errors_of,
    final_loss,
    passes_per_direction,
)

EXACT = Way("back-propagation")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(forward_gap, "JUDGED", 32)
    monkeypatch.setattr(forward_gap, "ESTIMATES", 2)


def test_directions_take_about_the_passes_that_there_are():
    for per_direction, count in ((2.07, 4), (1.32, 6), (0.81, 10), (9.0, 2)):
        assert directions_for(8.0, per_direction) == count


@pytest.mark.slow
def test_a_derivative_takes_fewer_passes_nearer_to_the_loss():
    sizes = {"batch_size": 16, "sequence_length": 10}
    deep, near = passes_per_direction(*small_model(0), (0, 2), **sizes)
    assert 0.5 < near < deep < 3


def test_the_same_directions_lead_to_the_same_loss():
    start, compared, derived = (
        final_loss(way, 2, 0.2, seed=1, steps=steps)
        for way, steps in (
            (EXACT, 0),
            (Way("compared", projected_gradients, 2), 2),
            (Way("derived", directional_derivatives, 2), 2),
        )
    )
    # Examples to judge by are other ones after two steps than before them.
    assert abs(start - math.log(2)) < 0.05
    assert compared == pytest.approx(derived, abs=1e-5)
    assert derived != final_loss(Way("more", directional_derivatives, 4), 2, 0.2, 1, 2)


def test_the_rate_is_the_first_seeds_best(monkeypatch):
    asked = []

    def loss(way, block, lr, seed):
        asked.append((lr, seed))
        return math.inf if lr > 1 else seed + (lr - 0.5) ** 2

    monkeypatch.setattr(forward_gap, "final_loss", loss)
    assert best_losses(EXACT, 0, (0.2, 0.5, 2.0)) == (0.5, [0.0, 1.0, 2.0])
    assert asked == [(0.2, 0), (0.5, 0), (2.0, 0), (0.5, 1), (0.5, 2)]


def test_a_loss_that_is_no_number_is_infinite(monkeypatch):
    monkeypatch.setattr(Way, "gradient", lambda self, model, *_, **__: _all_nan(model))
    assert final_loss(EXACT, 0, 0.1, seed=0, steps=1) == math.inf


def _all_nan(model):
    return {n: p.detach() * math.nan for n, p in model.named_parameters()}


def test_errors_are_none_of_the_gradient_and_as_many_as_weights_of_an_estimate():
    model, partition = small_model(0)
    batch = SmallTask.split(1, alpha=None, seed=0).draw(0, 0, 4)
    exact = errors_of(EXACT, model, partition, 2, batch)
    assert exact.cosine == pytest.approx(1)
    assert exact.variance == 0
    found = errors_of(
        Way("derived", directional_derivatives, 8), model, partition, 2, batch
    )
    weights = sum(
        model.get_parameter(name).numel() for name in partition.update_names(2)
    )
    assert found.cosine == pytest.approx(math.sqrt(8 / weights), rel=0.6)
    assert found.variance == pytest.approx(weights / 8, rel=0.8)
