"""What few devices say of a block's move, and the last round's."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lola_flwr.build import ServerStep, coordinator_for_weights
from lola_flwr.server.assembly import BlockUpdate, block_mean_named
from lola_flwr.server.steadied import steadied

BLOCKS = (("a", "b"), ("c",))
RNG = np.random.default_rng(3)
LAST = {n: RNG.normal(size=20).astype(np.float32) for n in "abc"}


def update(seed, names, *, around=0.0, spread=1.0, examples=8):
    rng = np.random.default_rng(seed)
    moves = {n: around + spread * rng.normal(size=20) for n in names}
    return BlockUpdate({n: m.astype(np.float32) for n, m in moves.items()}, examples)


def moved(updates, last=LAST):
    mean = block_mean_named("mean")(updates)
    return mean, steadied(mean, last, updates, BLOCKS)


def test_nearer_the_truth_than_mean_and_last_move():
    """Moves of the devices are drawn around a fleet's, which drifts from LAST."""
    errors = {"mean": [], "steadied": [], "last": []}
    for trial in range(40):
        rng = np.random.default_rng(trial)
        truth = {n: LAST[n] + 0.4 * rng.normal(size=20) for n in "ab"}
        updates = [
            BlockUpdate(
                {
                    n: (t + rng.normal(size=20)).astype(np.float32)
                    for n, t in truth.items()
                },
                8,
            )
            for _ in range(4)
        ]
        updates += [update(n, "c") for n in range(200)]
        mean, found = moved(updates)
        for kind, moves in (("mean", mean), ("steadied", found), ("last", LAST)):
            errors[kind].append(sum(np.square(moves[n] - truth[n]).sum() for n in "ab"))
    assert np.mean(errors["steadied"]) < 0.8 * np.mean(errors["mean"])
    assert np.mean(errors["steadied"]) < 0.9 * np.mean(errors["last"])


def test_the_part_is_that_of_the_formula_with_weights():
    updates = [update(1, "ab", examples=2), update(2, "ab", examples=6), update(3, "c")]
    mean, found = moved(updates)
    weights = np.array([0.25, 0.75])
    spread = sum(
        w * sum(np.square(u.gradients[n] - mean[n]).sum() for n in "ab")
        for w, u in zip(weights, updates[:2], strict=True)
    )
    squared = np.square(weights).sum()
    noise = (1 - 2 / 3) * squared * spread / (1 - squared)
    way = sum(np.square(mean[n] - LAST[n]).sum() for n in "ab")
    assert 0 < noise < way
    for n in "ab":
        expected = LAST[n] + (1 - noise / way) * (mean[n] - LAST[n])
        np.testing.assert_allclose(found[n], expected, rtol=1e-4, atol=1e-6)
        assert found[n].dtype == np.float32


def test_where_nothing_is_to_be_made_up_for_it_is_the_mean():
    everyone = [update(n, "abc") for n in range(3)]
    alone = [update(1, "ab"), update(2, "c"), update(3, "c")]
    agreeing = [update(1, "ab", spread=0.0, around=2.0)] * 2 + [update(3, "c")] * 2
    mean, found = moved(everyone)
    assert all(found[name] is move for name, move in mean.items())
    mean, found = moved(agreeing)
    for name, move in mean.items():
        np.testing.assert_allclose(found[name], move, rtol=1e-5, atol=1e-6)
    mean, found = moved(alone)
    assert [found[n] is mean[n] for n in "abc"] == [True, True, False]
    assert not np.allclose(found["c"], mean["c"])
    mean, found = moved(alone[1:] + [update(4, "ab")] * 2, last={})
    assert all(found[n] is mean[n] for n in mean)


def test_sizes_do_not_matter():
    updates = [update(1, "ab"), update(2, "ab"), update(3, "c")]
    large = [u.scaled(1e25) for u in updates]
    last = {name: np.float32(1e25) * move for name, move in LAST.items()}
    for name, move in moved(updates)[1].items():
        found = moved(large, last)[1][name]
        np.testing.assert_allclose(found, 1e25 * move, rtol=1e-4, atol=1e19)


def test_disagreement_about_no_change_leaves_the_last_move():
    few = [update(1, "c", spread=50), update(2, "c", spread=50)]
    few[1] = few[1].scaled(-1.0)
    others = [update(n, "ab") for n in range(20)]
    mean = {n: LAST[n].copy() for n in "abc"}
    mean["c"] = LAST["c"] + np.float32(0.01)
    found = steadied(mean, LAST, [*few, *others], BLOCKS)
    np.testing.assert_array_equal(found["c"], LAST["c"])


def test_a_resumed_run_remembers_the_last_move():
    def served():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        step = ServerStep(optimizer="SGD", lr=1.0, steady=True)
        coordinator = coordinator_for_weights(model, step=step)
        return coordinator, coordinator._model

    rng = np.random.default_rng(1)
    coordinator, model = served()
    (names,) = coordinator.partition.blocks
    head = coordinator.partition.head

    def updates():
        kinds = [names, names, head]
        shapes = {n: v.shape for n, v in coordinator.values().items()}
        return [
            BlockUpdate({n: rng.normal(size=shapes[n]).astype("f4") for n in kind}, 8)
            for kind in kinds
        ]

    first, second = updates(), updates()
    model.step(1, first)
    snapshot = coordinator.snapshot()
    arrays = {name: np.array(values) for name, values in snapshot.arrays.items()}
    model.step(2, second)
    again, resumed = served()
    again.restore(type(snapshot)(arrays, snapshot.values))
    resumed.step(2, second)
    for name, values in coordinator.values().items():
        np.testing.assert_array_equal(again.values()[name], values)
    plain, forgetful = served()
    arrays = {n: v for n, v in arrays.items() if not n.startswith("last-move/")}
    plain.restore(type(snapshot)(arrays, snapshot.values))
    forgetful.step(2, second)
    name = names[0]
    assert not np.array_equal(plain.values()[name], coordinator.values()[name])
