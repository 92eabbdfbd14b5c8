"""No owner of micro-batches steps the model further than owners usually do."""

from __future__ import annotations

import math
from dataclasses import replace
from io import BytesIO
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.d2ft.operations import Operation
from lola_flwr.run.checkpoint import Checkpoints
from lola_flwr.server.norm_limits import NormHistory, NormLimits
from lola_flwr.server.spread.losses import LossLimits, OwnLosses
from lola_flwr.server.spread.remote import spread_gradient
from simulations.attacks.attack import Attack
from tests.d2ft.cases import make
from tests.server.coordinators import npy
from tests.server.spread.test_audit import Federation, federation
from tests.server.spread.test_holding import assert_same, meet, take
from tests.server.spread.test_remote import DRAWS, Devices, spread

HONEST = NormLimits(math.inf, 3.0)


def own(*norms, head=1.0, weight=4):
    """Losses whose gradients have these norms, as limits know them."""
    size = math.sqrt(6) * weight
    slopes = [torch.full((weight, 2, 3), n / size) for n in norms]
    whole = torch.zeros(5, dtype=torch.float64)
    whole[3] = head / math.sqrt(weight * len(norms))
    return OwnLosses([weight] * len(norms), [0.5] * len(norms), slopes, [whole])


def sent(losses):
    """Kinds of gradients and their norms."""
    return [(kind, pytest.approx(norm)) for kind, norm in losses.norms()]


def test_what_is_compared_is_the_root_mean_square_of_an_example_s_own_gradient(rng):
    """Whatever the size of the micro-batch."""
    weight = torch.from_numpy(rng.standard_normal((3, 2)))
    for count in (1, 2, 7):
        hidden = torch.from_numpy(rng.standard_normal((count, 3))).requires_grad_()
        labels = torch.from_numpy(rng.integers(0, 2, count))
        loss = torch.nn.CrossEntropyLoss(reduction="none")(hidden @ weight, labels)
        (slope,) = torch.autograd.grad(loss.mean(), hidden, retain_graph=True)
        (each,) = torch.autograd.grad(loss.sum(), hidden)
        mean_square = each.square().sum(1).mean().item()
        losses = OwnLosses([count], [loss.mean().item()], [slope], [])
        assert [*losses.norms()] == [(0, pytest.approx(mean_square**0.5)), (1, 0.0)]


lengths = st.floats(1e-3, 1e3)


@given(
    honest=st.lists(lengths, min_size=2, max_size=6),
    times=st.sampled_from([1.0, 2.9, 3.1, 9.9, 29.0, 31.0, 1e6]),
    factor=st.sampled_from([1.5, 3.0, math.inf]),
)
def test_a_gradient_is_scaled_beyond_so_many_times_the_median(honest, times, factor):
    norms = [*honest, times * max(honest)]
    received = {f"{n}": own(norm, head=norm) for n, norm in enumerate(norms)}
    limits = LossLimits(NormLimits(math.inf, factor)).after(received)
    usual = median(norms)
    for device, norm in zip(received, norms, strict=True):
        before, after = received[device], received[device].held_to(limits)
        assert (after.weights, after.losses) == (before.weights, before.losses)
        found = dict(after.norms())
        for kind, gradient, was in (
            (0, after.slopes[0], before.slopes[0]),
            (1, after.head[0], before.head[0]),
        ):
            if norm > 10.001 * factor * usual:
                assert found[kind] == 0
            elif norm > 1.001 * factor * usual and norm < 9.999 * factor * usual:
                assert found[kind] == pytest.approx(usual, rel=1e-4)
                torch.testing.assert_close(gradient / gradient.norm(), was / was.norm())
            elif norm < 0.999 * factor * usual:
                assert torch.equal(gradient, was)


@pytest.mark.parametrize("times", [2.0, 9.9, 25.0])
def test_who_is_hostile_from_the_first_step_says_not_what_is_usual(times):
    """Two of twelve, who are asked as often as the others, or more."""
    rng = np.random.default_rng(0)
    limits = LossLimits(HONEST)
    for step in range(60):
        owners = rng.choice(12, 3, replace=False) if step else [0, 5, 7]
        received = {
            f"{n}": own(times if n < 2 else rng.uniform(0.5, 1.5)) for n in owners
        }
        limits = limits.after(received)
        for device, losses in received.items():
            held = dict(losses.held_to(limits).norms())
            assert held[0] <= 3 * 1.5
            if int(device) > 1:
                assert torch.equal(losses.held_to(limits).slopes[0], losses.slopes[0])


def test_no_device_has_more_than_five_of_the_last_norms_by_its_name():
    limits = LossLimits(HONEST, names={"id-1": "one", "id-2": "one"})
    limits = limits.after({f"{n}": own(1.0) for n in range(8)})
    for device in ("id-1", "id-2"):
        limits = limits.after({device: own(*[9.0] * 7)})
    assert limits.norms.devices[0].count("one") == 5
    assert limits.norms.usual(0) == pytest.approx(1.0)


def test_what_weighs_nothing_is_no_length():
    """A micro-batch without a label."""
    nothing = replace(own(1.0, 0.0), weights=[4, 0])
    assert sent(nothing) == [(0, 1.0), (1, pytest.approx(1 / math.sqrt(2)))]
    assert sent(replace(nothing, weights=[0, 0])) == []
    limits = LossLimits(HONEST).after({"a": replace(nothing, weights=[0, 0])})
    assert limits.norms == NormHistory()


def turned(factor):
    """Turns the gradients of losses round, that much longer."""

    def part(result, turn):
        report, arrays = result
        if turn.task.kind != "loss":
            return result
        return report, {n: array * np.float32(-factor) for n, array in arrays.items()}

    return Attack(name=f"turned {factor}", part=part)


def gradient(times=1.0, factor=3.0):
    """What the server finds in a step, where "b" sends its gradients so many times."""
    case = make("roberta")
    devices = Devices(case)

    def alter(device, task, reply):
        if (device, task.kind) != ("b", "loss"):
            return reply
        arrays = {name: np.load(BytesIO(data)) for name, data in reply.arrays.items()}
        changed = {name: npy(np.float32(times) * a) for name, a in arrays.items()}
        return replace(reply, arrays=changed)

    devices.alter = alter
    limits = LossLimits(NormLimits(math.inf, factor))
    operations = np.full((12, 4), Operation.FULL)
    return spread_gradient(
        spread(case, devices), DRAWS, 6, operations, example_weight=10, limits=limits
    )


def test_where_nothing_is_unusual_a_gradient_is_the_same_to_the_bit():
    limited, free = gradient(), gradient(factor=math.inf)
    assert_same(limited.gradients, free.gradients)
    assert np.array_equal(limited.squares, free.squares)


def test_a_liar_gains_no_length():
    """From the first step on, and however long it makes what it sends."""
    honest, usual, longer = gradient(), gradient(-1), gradient(-20)
    free, absurd = gradient(-20, math.inf), gradient(-1e3)
    for name, expected in usual.gradients.items():
        one = (honest.gradients[name] - expected).norm()  # two lengths of "b" 's part
        if one < 1e-3 * honest.gradients[name].norm():
            continue
        assert (longer.gradients[name] - expected).norm() < 1.5 * one
        assert (free.gradients[name] - expected).norm() > 5 * one
        assert (absurd.gradients[name] - honest.gradients[name]).norm() < 0.6 * one
    assert longer.limits.norms.of_block[0] != usual.limits.norms.of_block[0]


def test_who_is_too_long_is_not_accused():
    case, trainer = federation(share=0.0, dropout=False)
    devices = Federation(case, turned(9.9))
    records = take(trainer, devices, range(1, 5), moving=False)
    assert [record.skipped for record in records] == [None] * 4
    assert not trainer.state.fleet.absences.of_device
    assert {kind: len(n) for kind, n in trainer.state.norms.of_block.items()} == {
        0: 12,
        1: 12,
    }


def test_a_checkpoint_keeps_what_is_usual(tmp_path):
    case, first = federation(share=0.0, dropout=False)
    take(first, Federation(case), [1, 2], moving=False)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(first.server_round, first.snapshot())
    saved = checkpoints.latest()[0]
    _, second = federation(share=0.0, dropout=False)
    second.restore(saved)
    assert second.state.norms == first.state.norms
    assert second.state.norms.usual(0) < math.inf
    # As an earlier version saved it.
    del saved.values["state"]["norms"]
    case, third = federation(share=0.0, dropout=False)
    third.restore(saved)
    assert third.state.norms is None
    meet(third)
    (record,) = take(third, Federation(case), [3], moving=False)
    assert record.skipped is None
    assert len(third.state.norms.of_block[0]) == 3
