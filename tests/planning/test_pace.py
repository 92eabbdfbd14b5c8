"""What a second is worth: by the rounds so far, as noisy as gradients are now."""

from __future__ import annotations

import numpy as np
import pytest

from lola_flwr.allocation import progress
from lola_flwr.planning.pace import Brought, Pace
from lola_flwr.run.values import from_values, to_values

NOISE = np.array([100.0, 400.0])


def brought(batch_size: int, round_s: float) -> Brought:
    return Brought((0, 1), (batch_size, 2 * batch_size), (0.5, 1.0), round_s)


def test_it_is_what_all_rounds_bring_over_the_time_that_all_take():
    pace = Pace().after(brought(32, 2.0)).after(brought(64, 6.0))
    expected = sum(
        0.5 * progress(np.array(size), np.array(100.0))
        + progress(np.array(2 * size), np.array(400.0))
        for size in (32, 64)
    )
    assert pace.a_second(NOISE) == pytest.approx(expected / 8.0)
    # It is no mean of the rounds' own.
    own = [Pace().after(b).a_second(NOISE) for b in pace.rounds]
    assert pace.a_second(NOISE) < np.mean(own)


def test_a_usual_round_is_no_longer_for_one_that_was():
    assert Pace().usual_round_s is None
    pace = Pace()
    for round_s in (2.0, 3.0, 100.0):
        pace = pace.after(brought(32, round_s))
    assert pace.usual_round_s == 3.0


def test_where_gradients_become_noisier_no_second_is_worth_what_it_was():
    pace = Pace().after(brought(32, 2.0))
    assert pace.a_second(10 * NOISE) < 0.3 * pace.a_second(NOISE)


def test_the_latest_rounds_tell_it_and_none_without():
    assert Pace().a_second(NOISE) is None
    assert Pace().after(None).a_second(NOISE) is None
    pace = Pace().after(brought(512, 1e-3))
    for _ in range(16):
        pace = pace.after(brought(32, 2.0)).after(None)
    assert pace == Pace((brought(32, 2.0),) * 16)
    assert from_values(Pace, to_values(pace)) == pace
