"""Every optimizer and schedule goes on from a snapshot as if nothing had happened."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lola_flwr.errors import UserError
from lola_flwr.optimizer import ServerOptimizer, require_elementwise
from lola_flwr.run.checkpoint import Checkpoints, Snapshot

START = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(3, "f4"),
}
SCHEDULES = {
    "MultiStepLR": {"milestones": [2, 4]},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
    "CyclicLR": {"base_lr": 1e-3, "max_lr": 0.1, "step_size_up": 2},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "ExponentialLR": {"gamma": 0.7},
    "PolynomialLR": {"total_iters": 5},
}


def usable_optimizers():
    for name in sorted(vars(torch.optim)):
        try:
            ServerOptimizer(START, optimizer=name)
        except UserError:
            continue
        yield name


def options():
    for name in usable_optimizers():
        yield {"optimizer": name}
    for schedule, schedule_options in SCHEDULES.items():
        yield {
            "optimizer": "SGD",
            "momentum": 0.9,
            "schedule": schedule,
            "schedule_options": schedule_options,
        }
    yield {"optimizer": "AdamW", "amsgrad": True, "linear_decay_steps": 5}


def step(optimizer, rounds):
    for server_round in rounds:
        rng = np.random.default_rng(server_round)
        gradient = {n: rng.normal(size=v.shape).astype("f4") for n, v in START.items()}
        if server_round % 2:
            gradient.pop("b")
        optimizer.step(gradient)


def test_most_optimizers_are_usable():
    assert {"Adam", "AdamW", "SGD", "ASGD", "Rprop"} <= set(usable_optimizers())


@pytest.mark.parametrize(
    "arguments", list(options()), ids=lambda a: a.get("schedule", a["optimizer"])
)
def test_snapshots(tmp_path, arguments):
    whole = ServerOptimizer(START, **arguments)
    step(whole, range(8))
    first = ServerOptimizer(START, **arguments)
    step(first, range(3))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, first.snapshot())
    second = ServerOptimizer(START, **arguments)
    second.restore(checkpoints.latest()[0])
    step(second, range(3, 8))
    for name, values in whole.state().items():
        np.testing.assert_array_equal(second.state()[name], values)
    ends = [whole.snapshot(), second.snapshot()]
    assert json.dumps(ends[0].values) == json.dumps(ends[1].values)
    for name, array in ends[0].arrays.items():
        np.testing.assert_array_equal(ends[1].arrays[name], array, strict=True)


def test_a_snapshot_of_another_model_is_refused():
    snapshot = ServerOptimizer(START).snapshot()
    arrays = {**snapshot.arrays, "model/w": np.zeros((3, 3), np.float32)}
    with pytest.raises(UserError, match="other parameters"):
        ServerOptimizer(START).restore(Snapshot(arrays, snapshot.values))


def elementwise(arguments):
    try:
        require_elementwise(ServerOptimizer(START, **arguments))
    except UserError as error:
        assert f"optimizer={arguments['optimizer']!r} steps matrices as a" in str(error)
        return False
    return True


def test_who_steps_matrices_as_a_whole_is_refused():
    refused = {o["optimizer"] for o in options() if not elementwise(o)}
    assert refused & {"Adam", "AdamW", "SGD", "ASGD", "Rprop"} == set()
    assert refused >= {"Adafactor"} & set(usable_optimizers())


@pytest.mark.parametrize(
    "arguments",
    [o for o in options() if elementwise(o)],
    ids=lambda a: a.get("schedule", a["optimizer"]),
)
def test_another_one_goes_on_with_moments_and_counts(arguments):
    """Of part of the values; what is not of single values is the same for all."""
    whole = ServerOptimizer(START, **arguments)
    step(whole, range(0, 6, 2))
    moments, counts = whole.moments(["w"])["w"], whole.counts("w")
    left = {key: moment[:, :2] for key, moment in moments.items()}
    assert all(moment.shape == (2, 3) for moment in moments.values())
    other = whole.like({"left": whole.state()["w"][:, :2]})
    other.go_on(whole.steps, {"left": left}, counts)
    assert other.steps == whole.steps == 3
    for server_round in range(6, 12, 2):
        rng = np.random.default_rng(server_round)
        gradient = rng.normal(size=(2, 3)).astype("f4")
        other.step({"left": gradient[:, :2].copy()})
        whole.step({"w": gradient})
    np.testing.assert_allclose(
        other.state()["left"], whole.state()["w"][:, :2], rtol=1e-6
    )
    assert other.counts("left") == whole.counts("w")


def test_moments_begin_as_a_step_without_gradient_leaves_them():
    optimizer = ServerOptimizer(START, optimizer="AdamW", weight_decay=0.5)
    optimizer.step({"b": np.ones(3, "f4")})
    moments = optimizer.moments(["w", "b"])
    assert [*moments["w"]] == ["exp_avg", "exp_avg_sq"]
    assert not any(moment.any() for moment in moments["w"].values())
    assert all(moment.any() for moment in moments["b"].values())
    np.testing.assert_array_equal(optimizer.state()["w"], START["w"])
    moments["w"]["exp_avg"][:] = 1  # a view
    assert optimizer.moments(["w"])["w"]["exp_avg"].all()
    optimizer.set_counts(["w"], {"step": 7.0})
    assert optimizer.counts("w") == {"step": 7.0}
    assert optimizer.counts("b") == {"step": 1.0}
