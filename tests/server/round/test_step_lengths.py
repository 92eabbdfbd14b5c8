"""Where batches are chosen, steps by few examples are shorter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.build import RoundMode
from lola_flwr.system.gradient_noise import GradientNoise, step_length
from tests.server.coordinators import PARTITION, honest_reply, make_coordinator

NOISE = 300.0


def moved(sizes_of_blocks, *, silent=(), chosen=(8,), known=None):
    """Return by how much each block's and the head's values have moved in a round.

    Parameters
    ----------
    sizes_of_blocks
        Examples of their devices' batches; None: the round does not say.
    silent
        Blocks that are not sent.
    chosen
        Batches of which the run chooses.
    known
        What is known of the noise.
    """
    # Else a round may leave blocks out.
    everybody = RoundMode(participation="all")
    coordinator = make_coordinator(batch_sizes=chosen, mode=everybody)
    if known is not None:
        coordinator.state = replace(coordinator.state, noise=known)
    before = {name: v.copy() for name, v in coordinator.values().items()}
    plan = coordinator.plan_round(1, [f"id-{n}" for n in range(4)])
    if sizes_of_blocks is not None:
        sizes = np.zeros(4, np.int64)
        for row, _, block in plan.active():
            sizes[row] = sizes_of_blocks[block]
        solved = replace(plan.solved, batch_size=sizes, noise_scale=np.full(4, NOISE))
        plan = replace(plan, solved=solved)
    replies = [
        honest_reply(plan, device, value=0.25)
        for device, asked in plan.assignments.items()
        if asked.block_index not in silent
    ]
    coordinator.complete_round(plan, replies)
    after = coordinator.values()
    return [
        {
            round(float(x), 7)
            for name in names
            for x in np.unique(before[name] - after[name])
        }
        for names in (*PARTITION.blocks, PARTITION.head)
    ]


def test_a_block_s_step_is_as_long_as_its_batch_has_reason_for():
    *blocks, head = moved({0: 8, 1: 64, 2: 256})
    for found, size in zip(blocks, (8, 64, 256), strict=True):
        (step,) = found
        assert step == pytest.approx(0.25 * step_length(size, NOISE), rel=1e-5)
    assert head == {0.25}
    assert step_length(8, NOISE) < 0.4


def test_steps_are_shorter_where_the_noise_has_fallen():
    sizes = {0: 8, 1: 64, 2: 256}
    now = GradientNoise({0: (1.0,) * 24}, {0: (NOISE,) * 24}, examples={0: (1,) * 24})
    fallen = replace(now, largest=now.update([]).largest * 4)
    *blocks, head = moved(sizes, known=fallen)
    for (step,), (whole,) in zip(blocks, moved(sizes)[:3], strict=True):
        assert step == pytest.approx(whole / 2, rel=1e-5)
    # Of the head all devices' examples tell.
    assert head == {0.25}
    assert moved(sizes, chosen=(), known=fallen) == [{0.25}] * 4


@pytest.mark.parametrize("sizes", [None, {0: 8, 1: 64, 2: 256}])
def test_where_batches_are_not_chosen_all_steps_are_whole(sizes):
    """A rate is for the batch that is given, also where a round tells noise."""
    assert moved(sizes, chosen=()) == [{0.25}] * 4


def test_a_block_that_nobody_sent_is_not_moved():
    assert moved({0: 8, 1: 64, 2: 256}, silent=(1,))[1] == {0.0}


def test_what_several_devices_send_of_a_block_is_as_one_batch():
    coordinator = make_coordinator(num_devices=4)
    plan = coordinator.plan_round(1, [f"id-{n}" for n in range(4)])
    device, *_ = plan.assignments
    (block,) = plan.assignments[device].blocks
    other = next(d for d in plan.device_ids if d != device)
    asked = replace(plan.assignments[device])
    sizes, noise = np.full(4, 40), np.full(4, NOISE)
    plan = replace(
        plan,
        assignments={device: asked, other: asked},
        solved=replace(plan.solved, batch_size=sizes, noise_scale=noise),
    )
    assert plan.step_lengths([device]) == {block: step_length(40, NOISE)}
    assert plan.step_lengths([device, other]) == {block: step_length(80, NOISE)}
    assert plan.step_lengths([]) == {}
