from __future__ import annotations

import inspect
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from lola_flwr.errors import UserError
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.server.step import ServerStep


def test_missing_gradients_leave_values_alone():
    optimizer = ServerOptimizer(
        {"a": np.float32([1, 2]), "b": np.float32([3])}, optimizer="AdamW", lr=0.1
    )
    optimizer.step({"a": np.float32([1, -1])})
    state = optimizer.state()
    # AdamW's first step moves by lr against the sign, after decay by lr * 0.01.
    np.testing.assert_allclose(state["a"], [0.999 - 0.1, 2 * 0.999 + 0.1], rtol=1e-6)
    np.testing.assert_array_equal(state["b"], [3])


def test_sgd_by_name():
    optimizer = ServerOptimizer({"a": np.float32([1])}, optimizer="SGD", lr=0.5)
    optimizer.step({"a": np.float32([2])})
    np.testing.assert_allclose(optimizer.state()["a"], [0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Adamw", {}, "optimizer='Adamw' is not an optimizer of torch.optim"),
        ("Optimizer", {"lr": 1.0}, "optimizer='Optimizer'"),
        ("SGD", {"lr": -1.0}, "Invalid learning rate"),
        ("SGD", {"speed": 1.0}, "speed"),
        # Refused by the first step, or by whatever happens to go wrong.
        ("ASGD", {"t0": "now"}, "optimizer='ASGD': unsupported operand"),
        ("AdamW", {"capturable": True}, "optimizer='AdamW': If capturable=True"),
        ("AdamW", {"betas": (0.9,)}, "optimizer='AdamW': tuple index"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(UserError, match=message):
        ServerOptimizer({"a": np.float32([1])}, optimizer=name, **options)


def test_initial_values_are_copied():
    initial = np.float32([1])
    optimizer = ServerOptimizer({"a": initial}, optimizer="SGD", lr=1.0)
    optimizer.step({"a": np.float32([1])})
    assert initial[0] == 1


def test_learning_rate_decays_to_zero():
    optimizer = ServerOptimizer(
        {"a": np.float32([0])}, optimizer="SGD", lr=1.0, linear_decay_steps=4
    )
    positions = []
    for _ in range(5):
        optimizer.step({"a": np.float32([-1])})
        positions.append(float(optimizer.state()["a"][0]))
    # Steps of 1, 3/4, 1/2, 1/4 and 0.
    np.testing.assert_allclose(positions, [1, 1.75, 2.25, 2.5, 2.5])


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_optimizers_that_cannot_step_are_refused_at_once(name):
    with pytest.raises(UserError, match=f"optimizer='{name}'"):
        ServerOptimizer({"a": np.float32([1])}, optimizer=name, lr=0.1)


def test_a_schedule_by_name():
    optimizer = ServerOptimizer(
        {"a": np.float32([0])},
        optimizer="SGD",
        lr=1.0,
        schedule="StepLR",
        schedule_options={"step_size": 2, "gamma": 0.5},
    )
    positions = []
    for _ in range(5):
        optimizer.step({"a": np.float32([-1])})
        positions.append(float(optimizer.state()["a"][0]))
    # Two steps each of 1 and 1/2, then one of 1/4.
    np.testing.assert_allclose(positions, [1, 2, 2.5, 3, 3.25])


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ("Cosine", {}, "schedule='Cosine' is not a schedule"),
        ("ReduceLROnPlateau", {}, "counts steps"),
        ("StepLR", {}, "schedule='StepLR': .*step_size"),
        ("StepLR", {"speed": 1}, "speed"),
        # Refused by the first step, here and not in the first round.
        ("StepLR", {"step_size": 0}, "schedule='StepLR': .*zero"),
    ],
)
def test_bad_schedules(schedule, options, message):
    with pytest.raises(UserError, match=message):
        ServerOptimizer(
            {"a": np.float32([1])},
            optimizer="SGD",
            lr=1.0,
            schedule=schedule,
            schedule_options=options,
        )


def test_loaded_values_replace_the_old():
    optimizer = ServerOptimizer({"a": np.float32([1])}, optimizer="SGD", lr=1.0)
    optimizer.load({"a": np.array([5.0]), "other": np.array([0.0])})
    optimizer.step({"a": np.float32([1])})
    np.testing.assert_array_equal(optimizer.state()["a"], [4])


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adagrad", "RMSprop", "Adafactor"])
def test_steps_are_those_of_torch(name, rng):
    start = rng.normal(size=(4, 3)).astype(np.float32)
    gradients = rng.normal(size=(5, 4, 3)).astype(np.float32)
    factory = getattr(torch.optim, name)
    offers = "fused" in inspect.signature(factory).parameters
    for options in ({}, {"fused": True}) if offers else ({},):
        parameter = torch.nn.Parameter(torch.tensor(start))
        reference = factory([parameter], lr=0.01, **options)
        optimizer = ServerOptimizer({"a": start}, optimizer=name, lr=0.01)
        for gradient in gradients:
            optimizer.step({"a": gradient})
            parameter.grad = torch.tensor(gradient)
            reference.step()
        expected = parameter.numpy(force=True)
        assert not np.array_equal(expected, start)
        # One that goes over the memory once is equal to rounding.
        tolerance = 1e-6 if offers and not options else 0
        np.testing.assert_allclose(
            optimizer.state()["a"], expected, rtol=tolerance, atol=tolerance
        )


def test_a_step_of_an_option_s_own_kind_is_left_alone():
    plain = ServerOptimizer({"a": np.float32([1])}, lr=0.1, foreach=False)
    fused = ServerOptimizer({"a": np.float32([1])}, lr=0.1)
    for optimizer, expected in ((plain, None), (fused, True)):
        (group,) = optimizer.snapshot().values["groups"]
        assert group["fused"] is expected


@pytest.mark.parametrize("changes", [False, True])
def test_received_gradients_are_never_changed(monkeypatch, changes):
    class Careless(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            if changes:
                self.param_groups[0]["params"][0].grad.zero_()

    monkeypatch.setattr(torch.optim, "Careless", Careless, raising=False)
    optimizer = ServerOptimizer({"a": np.float32([1])}, optimizer="Careless", lr=0.5)
    received = np.frombuffer(np.float32([1]).tobytes(), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step({"a": received})
    assert received[0] == 1
    assert optimizer.state()["a"][0] == 0.5


def test_values_are_in_one_storage_by_their_names():
    values = {"b": np.float32([[1, 2], [3, 4]]), "a": np.float32(5), "c": np.zeros(0)}
    optimizer = ServerOptimizer(values, optimizer="SGD", lr=1.0)
    assert [*optimizer.state()] == ["b", "a", "c"]
    assert optimizer.flat.tolist() == [5, 1, 2, 3, 4]
    optimizer.step({"b": np.float32([[1, 1], [1, 1]])})
    assert optimizer.flat.tolist() == [5, 0, 1, 2, 3]
    optimizer.load({"b": np.zeros((2, 2)), "a": np.float64(7), "c": np.zeros(0)})
    assert optimizer.flat.tolist() == [7, 0, 0, 0, 0]


@pytest.mark.slow
def test_the_compiler_of_pytorch_stays_out_of_memory():
    program = (
        "import sys, numpy as np\n"
        "from lola_flwr.optimizer import ServerOptimizer\n"
        "one = np.ones(2, np.float32)\n"
        "optimizer = ServerOptimizer({'a': one}, optimizer='AdamW', lr=0.1)\n"
        "optimizer.step({'a': one})\n"
        "assert optimizer.state()['a'][0] < 1\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_moves_go_past_the_optimizer():
    optimizer = ServerOptimizer(
        {"a": np.float32([1, 2]), "b": np.float32([3])},
        optimizer="SGD",
        lr=1.0,
        momentum=0.5,
    )
    optimizer.step({"a": np.float32([1, 1]), "b": np.float32([1])})
    optimizer.shift({"a": np.float32([10, -20])})
    np.testing.assert_array_equal(optimizer.state()["a"], [10, -19])
    np.testing.assert_array_equal(optimizer.state()["b"], [2])
    # What it has of momentum is that of the step alone.
    optimizer.step({"a": np.float32([0, 0])})
    np.testing.assert_array_equal(optimizer.state()["a"], [9.5, -19.5])


def test_a_linear_decay_ends_at_zero_and_stays_there():
    optimizer = ServerOptimizer(
        {"a": np.float32([0])}, optimizer="SGD", lr=1.0, linear_decay_steps=2
    )
    for expected in (-1.0, -1.5, -1.5, -1.5):
        optimizer.step({"a": np.float32([1])})
        assert optimizer.state()["a"].tolist() == [expected]


def test_values_and_gradients_of_any_precision_are_stepped_in_float32():
    third = np.array([1 / 3])
    optimizer = ServerOptimizer({"a": third}, optimizer="SGD", lr=1.0)
    assert optimizer.state()["a"].dtype == np.float32
    optimizer.step({"a": third})
    np.testing.assert_array_equal(
        optimizer.state()["a"], np.zeros(1, np.float32), strict=True
    )


def test_a_step_s_fields_are_an_optimizer_s_arguments():
    step = ServerStep(
        optimizer="SGD",
        lr=0.5,
        options={"momentum": 0.9},
        linear_decay_steps=7,
        schedule="StepLR",
        schedule_options={"step_size": 3},
        block_mean="median",
    )
    assert step.arguments() == {
        "optimizer": "SGD",
        "lr": 0.5,
        "momentum": 0.9,
        "linear_decay_steps": 7,
        "schedule": "StepLR",
        "schedule_options": {"step_size": 3},
    }
    made = ServerOptimizer({"a": np.float32([1])}, **step.arguments())
    made.step({"a": np.float32([1])})
    assert made.state()["a"].tolist() == [0.5]
    assert ServerStep().arguments()["optimizer"] == "AdamW"


@pytest.mark.parametrize("name", ["lr", "schedule"])
def test_an_option_with_a_field_of_its_own_is_refused(name):
    options = {"momentum": 0.9, name: 1.0, "weight_decay": 0.1}
    with pytest.raises(UserError, match=f"{name} is an argument of its own"):
        ServerStep(options=options).arguments()


def test_a_schedule_of_a_single_step_is_no_fault():
    optimizer = ServerOptimizer(
        {"a": np.float32([1])},
        optimizer="SGD",
        lr=1.0,
        momentum=0.9,
        schedule="OneCycleLR",
        schedule_options={"max_lr": 1.0, "total_steps": 1},
    )
    optimizer.step({"a": np.float32([1])})
