from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.errors import UserError
from lola_flwr.randomness import rng_for
from lola_flwr.server.selection import (
    BlockHistory,
    BoundedStaleness,
    ImportanceSampled,
    LargestMoves,
    Lisa,
    OutlierWeighted,
    Progressive,
    RoundRobin,
)

DRAW = partial(rng_for, 5)


def choices(selector, *, num_blocks=6, rounds=400, max_blocks=6, history=None):
    """Choose round after round, every chosen block being trained."""
    history = BlockHistory.of(num_blocks) if history is None else history
    chosen = []
    for server_round in range(1, rounds + 1):
        blocks = selector(server_round, history, max_blocks, DRAW)
        assert len(set(blocks)) == len(blocks) <= max_blocks
        history = history.after_round(server_round, dict.fromkeys(blocks, np.nan))
        chosen.append(blocks)
    return chosen


def longest_wait(chosen, num_blocks):
    """Most rounds between two trainings of a block, the start counting as one."""
    waits = []
    for block in range(num_blocks):
        rounds = [0, *(r for r, c in enumerate(chosen, start=1) if block in c)]
        waits += [*np.diff(rounds), len(chosen) + 1 - rounds[-1]]
    return max(waits)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_round_robin_bounds_staleness(num_blocks, count, max_blocks):
    chosen = choices(
        RoundRobin(count), num_blocks=num_blocks, rounds=40, max_blocks=max_blocks
    )
    a_round = min(count, max_blocks, num_blocks)
    assert longest_wait(chosen, num_blocks) == -(-num_blocks // a_round)


def test_round_robin_repeats_a_block_whose_update_was_lost():
    history = BlockHistory.of(4).after_round(1, {3: 0.1, 2: 0.1})
    history = history.after_round(2, {1: 0.1})  # block 0's was lost
    assert RoundRobin(2)(3, history, 4, DRAW) == (0, 3)


def test_lisa_draws_every_block_alike_and_keeps_a_draw_for_its_period():
    chosen = choices(Lisa(count=2, period=5), rounds=5 * 1200)
    periods = [set(blocks) for blocks in chosen[::5]]
    for number, blocks in enumerate(periods):
        assert all(set(b) == blocks for b in chosen[5 * number : 5 * number + 5])
    frequency = np.mean([[b in blocks for b in range(6)] for blocks in periods], axis=0)
    # 2 of 6; five standard deviations of a mean over 1200 draws.
    np.testing.assert_allclose(frequency, 2 / 6, atol=5 * np.sqrt(2 / 9 / 1200))


def test_lisa_chooses_in_a_resumed_run_as_in_an_unbroken_one():
    unbroken = choices(Lisa(count=2, period=5), rounds=12)
    history = BlockHistory.of(6)
    resumed = [Lisa(count=2, period=5)(r, history, 6, DRAW) for r in range(8, 13)]
    assert resumed == unbroken[7:]


def test_outlier_weights_are_the_chances():
    weights = (0.1, 0.2, 0.3, 0.4)
    selector = OutlierWeighted(count=1, weights=weights, period=1)
    chosen = choices(selector, num_blocks=4, rounds=4000)
    frequency = np.bincount([b for (b,) in chosen], minlength=4) / 4000
    np.testing.assert_allclose(frequency, weights, atol=5 * np.sqrt(0.25 / 4000))


def test_important_blocks_are_drawn_more_often():
    history = replace(
        BlockHistory.of(4), importance=np.log(np.array([1, 1, 3, 9]) / [9, 3, 3, 1])
    )
    selector = ImportanceSampled(count=1)
    drawn = [selector(r, history, 4, DRAW)[0] for r in range(4000)]
    # Sigmoids of these log-odds: 1/10, 1/4, 1/2, 9/10; their sum is 1.75.
    expected = np.array([0.1, 0.25, 0.5, 0.9]) / 1.75
    frequency = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(frequency, expected, atol=5 * np.sqrt(0.25 / 4000))


def test_slimfit_freezes_what_moved_least_and_thaws_it_when_the_others_slow_down():
    history = BlockHistory.of(3)
    selector = LargestMoves(count=2)
    assert selector(1, history, 3, DRAW) == (2, 1)
    history = history.after_round(1, {2: 0.5, 1: 0.1})
    assert set(selector(2, history, 3, DRAW)) == {0, 2}  # never trained: first
    history = history.after_round(2, {0: 0.3, 2: 0.4})
    assert selector(3, history, 3, DRAW) == (2, 0)
    history = history.after_round(3, {2: 0.2, 0: 0.05})
    assert selector(4, history, 3, DRAW) == (2, 1)


def test_progressive_grows_from_the_loss_down():
    chosen = choices(Progressive(stage_rounds=2, step=2), num_blocks=5, rounds=7)
    assert [sorted(blocks) for blocks in chosen] == [
        *[[3, 4]] * 2,
        *[[1, 2, 3, 4]] * 2,
        *[[0, 1, 2, 3, 4]] * 3,
    ]


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 3), st.integers(0, 10**6))
def test_bounded_staleness_keeps_its_bound(num_blocks, max_blocks, slack, seed):
    bound = -(-num_blocks // max_blocks) + slack
    selector = BoundedStaleness(Lisa(count=1, period=3), max_rounds=bound)
    history = BlockHistory.of(num_blocks)
    chosen = []
    for server_round in range(1, 60):
        blocks = selector(server_round, history, max_blocks, partial(rng_for, seed))
        assert len(set(blocks)) == len(blocks) <= max_blocks
        history = history.after_round(server_round, dict.fromkeys(blocks, 0.1))
        chosen.append(blocks)
    assert longest_wait(chosen[:-1], num_blocks) <= bound


def test_a_loose_bound_leaves_the_inner_choice_alone():
    inner = choices(Lisa(count=2, period=1), rounds=200)
    bounded = choices(BoundedStaleness(Lisa(count=2, period=1), 1000), rounds=200)
    assert bounded == inner


@pytest.mark.parametrize(
    "make",
    [
        lambda: RoundRobin(0),
        lambda: Lisa(1, period=0),
        lambda: OutlierWeighted(1, (0.0, 1.0)),
        lambda: Progressive(0),
        lambda: BoundedStaleness(RoundRobin(1), 0),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(UserError, match=r"must be"):
        make()
