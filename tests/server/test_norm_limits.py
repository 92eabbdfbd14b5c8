from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.server.norm_limits import NormHistory, NormLimits
from tests.server.coordinators import honest_reply, make_coordinator


def test_the_usual_norm_is_the_median_of_a_block():
    history = NormHistory()
    for norm in (1.0, 2.0):
        history = history.after([(0, norm, f"{norm}")])
        assert history.usual(0) == np.inf
    history = history.after([(0, 100.0, "c")])
    assert history.usual(0) == 2.0
    assert history.usual(1) == np.inf
    # Honest norms that grow for good are the usual ones after a while.
    history = history.after((0, 50.0, f"{n}") for n in range(60))
    assert history.usual(0) == 50.0
    assert len(history.of_block[0]) == 20
    assert NormHistory({0: (0.0,) * 9}).usual(0) == np.inf


def test_the_last_20_norms_of_a_block_count_the_newest_included():
    numbers = [(block, float(n), f"{n}") for n in range(25) for block in (3, 5)]
    history = NormHistory().after(numbers).after([(3, 99.0, "a")])
    assert history.of_block[3] == (*map(float, range(6, 25)), 99.0)
    assert history.of_block[5] == tuple(map(float, range(5, 25)))


def test_no_device_says_by_itself_what_is_usual():
    history = NormHistory().after((0, 1.0, f"{n}") for n in range(8))
    history = history.after([(0, 1e6, "often asked")] * 100)
    assert history.usual(0) == 1.0
    assert history.of_block[0] == (1.0,) * 8 + (1e6,) * 5
    # Of an earlier version's norms nobody knows whose they are.
    assert NormHistory({0: (1.0,) * 9}).after([(0, 5.0, "a")]).usual(0) == 1.0


# What a norm is of a border: below it, on it or above it, by a little or by far.
BELOW, ABOVE = (1e-9, 0.5, 1 - 1e-9), (1 + 1e-9, 2.0, 50.0, 1e9)
powers_of_two = st.integers(-20, 20).map(lambda exponent: 2.0**exponent)


@given(
    usual=powers_of_two,
    factor=st.sampled_from([1.5, 3.0, 8.0]),
    max_norm=powers_of_two,
    border=st.sampled_from(["refused", "usual", "largest"]),
    ratio=st.sampled_from([*BELOW, 1.0, *ABOVE]),
)
def test_large_updates_are_scaled_down_and_monstrous_ones_refused(
    usual, factor, max_norm, border, ratio
):
    # Powers of two: every border is a number that floating point holds exactly.
    refused = min(10 * factor * usual, 1e6 * max_norm)
    limit = min(factor * usual, max_norm)
    norm = ratio * {"refused": refused, "usual": limit, "largest": max_norm}[border]
    scale = NormLimits(max_norm, factor).scale(norm, usual)
    if norm > refused:
        assert scale == 0
    elif norm > limit:
        assert norm * scale == pytest.approx(min(usual, max_norm), rel=1e-12)
    else:
        assert scale == 1


@given(
    norm=st.floats(1e-6, 1e5),
    elsewhere=powers_of_two | st.just(np.inf),
    usual=powers_of_two,
)
def test_until_a_block_is_known_all_blocks_say_what_is_long_and_nothing_is_refused(
    norm, elsewhere, usual
):
    limits = NormLimits(10.0, 3.0)
    scale = limits.scale(norm, np.inf, elsewhere)
    is_long = norm > min(3 * elsewhere, 10.0)
    assert norm * scale == pytest.approx(min(elsewhere, 10.0) if is_long else norm)
    assert limits.scale(norm, usual, elsewhere) == limits.scale(norm, usual)


def test_what_is_usual_of_all_blocks_is_the_median_of_their_norms():
    history = NormHistory().after([(0, 1.0, "a"), (1, 2.0, "b")])
    assert history.elsewhere == np.inf
    history = history.after([(2, 20.0, "c")])
    assert (history.elsewhere, history.usual(2)) == (2.0, np.inf)
    assert NormHistory({0: (0.0,) * 2, 1: (0.0,)}).elsewhere == np.inf


def test_absurd_updates_are_refused_before_anything_is_usual():
    assert NormLimits(10.0, 3.0).scale(1e7, np.inf) == pytest.approx(1e-6)
    assert NormLimits(10.0, 3.0).scale(np.nextafter(1e7, 1e8), np.inf) == 0


@given(st.floats(0, 1e7), powers_of_two | st.just(np.inf))
def test_without_limits_nothing_is_scaled(norm, usual):
    assert NormLimits(np.inf, np.inf).scale(norm, usual) == 1
    # Of a block that is not known only the largest norm is a limit.
    assert NormLimits(10.0, 3.0).scale(norm, np.inf) == pytest.approx(
        min(1.0, 10.0 / max(norm, 1e-300))
    )


@pytest.mark.parametrize("batch_size", [None, 8])
def test_the_update_of_a_small_batch_may_be_as_long_as_its_noise_lets_it_be(batch_size):
    """Of 8 examples with a noise scale of 800 it is 10 times as long as of many."""
    coordinator = make_coordinator(num_devices=4, norm_factor=3.0, reputation=True)
    ids = [f"id-{n}" for n in range(4)]
    for server_round in range(1, 6):
        plan = coordinator.plan_round(server_round, ids)
        device, *others = plan.assignments
        sizes = np.full(4, 10_000)
        if server_round == 5 and batch_size is not None:
            sizes[plan.device_ids.index(device)] = batch_size
        solved = replace(plan.solved, batch_size=sizes, noise_scale=np.full(4, 800.0))
        plan = replace(plan, solved=solved)
        long = 8.0 if server_round == 5 else 1.0
        rng = np.random.default_rng(server_round)
        coordinator.complete_round(
            plan,
            [
                honest_reply(plan, each, value=rng.uniform(0.4, 0.6) * factor)
                for each, factor in [
                    (device, long),
                    *((other, 1.0) for other in others),
                ]
            ],
        )
    evidence = coordinator.state.reputation.of_device[plan.profiles[device].name]
    if batch_size is None:
        assert evidence.lengths < -1.0
    else:
        assert evidence.lengths == 0.0


def test_the_first_step_is_not_longer_than_other_blocks_of_its_round_say():
    def moved(factor):
        coordinator = make_coordinator(num_devices=4, norm_factor=3.0, lr=1.0)
        before = {name: v.copy() for name, v in coordinator.values().items()}
        plan = coordinator.plan_round(1, [f"id-{n}" for n in range(4)])
        long, *others = plan.assignments
        replies = [honest_reply(plan, d, value=0.02) for d in others]
        replies.append(honest_reply(plan, long, value=0.02 * factor))
        record = coordinator.complete_round(plan, replies)
        assert {block.status for block in record.blocks} == {"accepted"}
        (block,) = plan.assignments[long].blocks
        name = coordinator.partition.blocks[block][0]
        return np.abs(coordinator.values()[name] - before[name]).max()

    assert moved(1.0) == pytest.approx(0.02)
    assert moved(9.9) <= 0.02 * 1.5
    assert moved(9.9) == pytest.approx(moved(500.0))
