"""The noise scale of gradients, beside that of many per-sample gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.run.values import from_values, to_values
from lola_flwr.system.gradient_noise import (
    GradientNoise,
    NoiseObservation,
    step_length,
)
from tests.marks import rest_slow

PARTITION = BlockPartition(
    (("first.weight", "first.bias"), ("second.weight", "second.bias")),
    ("head.weight", "head.bias"),
    (),
)
NUM_SAMPLES, BATCH = 1500, 128


class Small(nn.Module):
    """Two hidden layers, and classes that are mostly noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, x, y):
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return nn.functional.cross_entropy(self.head(hidden), y)


def loss(model, batch):
    return model(**batch)


@pytest.fixture(scope="module")
def setting():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small()
        x = torch.randn(NUM_SAMPLES, 20)
        scores = x @ torch.randn(20, 4) + 3 * torch.randn(NUM_SAMPLES, 4)
    return model, {"x": x, "y": scores.argmax(1)}


def per_sample_scale(model, batch, block: int) -> float:
    """``tr(Sigma) / |G|^2`` of all samples, each one's gradient by itself."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    own = {name: parameters.pop(name) for name in PARTITION.blocks[block]}

    def of_one(own, x, y):
        args = {"x": x[None], "y": y[None]}
        return torch.func.functional_call(model, {**parameters, **own}, (), args)

    each = torch.func.vmap(torch.func.grad(of_one), (None, 0, 0))(own, *batch.values())
    gradients = torch.cat([g.flatten(1) for g in each.values()], dim=1)
    mean = gradients.mean(0)
    variance = float((gradients - mean).square().sum()) / (NUM_SAMPLES - 1)
    return variance / (float(mean.square().sum()) - variance / NUM_SAMPLES)


def measured_scales(model, data, seed: int) -> list[float]:
    """Return each block's noise scale as 24 rounds of mini-batches tell it."""
    rng, noise = np.random.default_rng(seed), GradientNoise()
    for _ in range(24):
        seen = []
        for block in range(2):
            rows = rng.choice(NUM_SAMPLES, BATCH, replace=False)
            batch = {name: values[rows] for name, values in data.items()}
            found = block_gradient(
                model, PARTITION, block, batch, loss_function=loss, num_groups=4
            ).squares
            seen.append(
                NoiseObservation(
                    block,
                    found.few_examples,
                    *found.few_squares,
                    found.all_examples,
                    *found.all_squares,
                )
            )
        noise = noise.update(seen)
    return [noise.measured(block) for block in range(2)]


def test_the_noise_scale_is_that_of_many_per_sample_gradients(setting):
    model, data = setting
    true = [per_sample_scale(model, data, block) for block in range(2)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        measured = [measured_scales(model, data, seed) for seed in range(6)]
    # What 24 rounds tell has a standard deviation of 5 and 8 %.
    np.testing.assert_allclose(np.median(measured, axis=0), true, rtol=0.1)
    np.testing.assert_allclose(measured, np.tile(true, (6, 1)), rtol=0.2)


def test_squares_are_those_of_each_block_alone_and_change_no_gradient(setting):
    model, data = setting
    batch = {name: values[:32] for name, values in data.items()}
    usual = block_gradient(model, PARTITION, (0, 1), batch, loss_function=loss)
    found = block_gradient(
        model, PARTITION, (0, 1), batch, loss_function=loss, num_groups=4
    )
    assert usual.squares is None
    assert (found.squares.few_examples, found.squares.all_examples) == (8, 32)
    for block, names in enumerate(PARTITION.blocks):
        total = sum(float(usual.gradients[name].square().sum()) for name in names)
        assert found.squares.all_squares[block] == pytest.approx(total, rel=1e-4)
        assert found.squares.few_squares[block] > found.squares.all_squares[block]
    for name, gradient in usual.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient)
    assert found.loss == pytest.approx(usual.loss, rel=1e-5)


@pytest.mark.parametrize("num_examples", rest_slow([5, 2, 3, 9, 31, 32], 1))
def test_groups_of_any_size_tell_the_square_over_few_without_bias(
    setting, num_examples
):
    """Over many draws, it is what `few` examples drawn alone have."""
    model, data = setting
    batch = {name: values[:num_examples] for name, values in data.items()}
    few = math.ceil(num_examples / min(4, num_examples))
    alone, told = [], []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(600):
            found = block_gradient(
                model, PARTITION, 1, batch, loss_function=loss, num_groups=4
            ).squares
            assert found.few_examples == few
            told.extend(found.few_squares)
            rows = torch.randperm(num_examples)[:few]
            drawn = {name: values[rows] for name, values in batch.items()}
            own = block_gradient(model, PARTITION, 1, drawn, loss_function=loss)
            squares = [own.gradients[n].square().sum() for n in PARTITION.blocks[1]]
            alone.append(float(sum(squares)))
    assert np.mean(told) == pytest.approx(np.mean(alone), rel=0.05)
    assert min(told) >= 0


def test_a_group_that_weighs_nothing_tells_nothing(setting):
    model, data = setting
    batch = {name: values[:4] for name, values in data.items()}

    def learned(part):
        return int((part["y"] >= 0).sum())

    batch["y"] = torch.tensor([0, -100, -100, 1])
    found = block_gradient(
        model,
        PARTITION,
        1,
        batch,
        loss_function=loss,
        batch_weight=learned,
        num_groups=4,
    )
    usual = block_gradient(
        model, PARTITION, 1, batch, loss_function=loss, batch_weight=learned
    )
    for name, gradient in usual.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient)
    one = {name: values[:1] for name, values in batch.items()}
    assert (
        block_gradient(
            model, PARTITION, 1, one, loss_function=loss, num_groups=4
        ).squares
        is None
    )


def observation(block: int, scale: float, rng: np.random.Generator) -> NoiseObservation:
    """One that is right on average, of ``|G| = 1``."""
    squares = [1.0 + scale / n * rng.uniform(0.8, 1.2) for n in (16, 128)]
    return NoiseObservation(block, 16, squares[0], 128, squares[1])


def test_what_few_examples_say_counts_for_little():
    """Of 4 examples, noise alone is 50 times the signal; of 512 it is not."""
    rng, scale = np.random.default_rng(0), 200.0
    noise = GradientNoise()
    for n in range(24):
        few, most = (1, 8) if n % 2 else (32, 256)
        squares = [1 + scale / count * rng.uniform(0.3, 1.7) for count in (few, most)]
        seen = NoiseObservation(0, few, squares[0], most, squares[1])
        noise = noise.update([seen])
    assert noise.measured(0) == pytest.approx(scale, rel=0.4)
    # A checkpoint of an earlier version says nothing of numbers of examples.
    earlier = replace(noise, examples={})
    seen = observation(0, scale, rng)
    assert earlier.measured(0) != noise.measured(0)
    assert len(earlier.update([seen]).examples[0]) == 24


def test_without_observations_all_blocks_have_the_same_scale():
    scales = GradientNoise().scales(3)
    assert (scales == scales[0]).all()
    assert 16 < scales[0] < 1024


def test_blocks_differ_once_they_are_known_but_none_is_below_the_median():
    rng, noise = np.random.default_rng(0), GradientNoise()
    for _ in range(24):
        noise = noise.update([observation(n, 50.0 * 4**n, rng) for n in range(3)])
    first, second, third = noise.scales(3)
    assert first == pytest.approx(noise.largest)
    assert second == pytest.approx(noise.largest, rel=0.1)
    assert 2 < third / second < 3


def test_few_observations_without_a_signal_say_little():
    noise = GradientNoise()
    for _ in range(3):
        seen = [NoiseObservation(n, 16, 10.0, 128, 0.5) for n in range(6)]
        noise = noise.update(seen)
    assert noise.measured(0) == 1e5
    assert 128 < noise.scales(6).max() < 2000


def test_a_scale_that_falls_is_not_followed():
    rng, noise = np.random.default_rng(0), GradientNoise()
    for scale in (*[400.0] * 24, *[10.0] * 24):
        noise = noise.update([observation(n, scale, rng) for n in range(3)])
    assert noise.measured(0) < 20
    assert (noise.scales(3) > 400 / 4).all()


def test_steps_are_shortened_where_it_has_fallen_until_it_is_back():
    rng, noise, factors = np.random.default_rng(0), GradientNoise(), []
    assert noise.step_factor() == 1.0
    for scale in (400.0, 100.0, 0.01, 800.0):
        for _ in range(24):
            noise = noise.update([observation(n, scale, rng) for n in range(3)])
        factors.append(noise.step_factor())
    assert factors[0] > 0.95
    assert factors[1] == pytest.approx(0.5, rel=0.1)
    # Not to nothing.
    assert factors[2] == 0.25
    assert factors[3] > 0.95


def test_a_fall_is_believed_once_as_much_is_known_of_every_block_as_counts():
    rng, noise = np.random.default_rng(0), GradientNoise()
    for scale in (400.0,) * 12 + (1.0,) * 11:
        noise = noise.update([observation(n, scale, rng) for n in range(3)])
        assert noise.step_factor() == 1.0
    noise = noise.update([observation(n, 1.0, rng) for n in (0, 1)])
    assert noise.step_factor() == 1.0
    noise = noise.update([observation(2, 1.0, rng)])
    assert noise.step_factor() < 0.9


@pytest.mark.parametrize("lie", [0.0, 1e18])
def test_a_device_that_lies_moves_its_own_block_within_bounds_and_no_other(lie):
    rng, honest, told = np.random.default_rng(1), GradientNoise(), GradientNoise()
    for _ in range(24):
        seen = [observation(n, 100.0, rng) for n in range(6)]
        honest = honest.update(seen)
        told = told.update([NoiseObservation(0, 16, lie, 128, 1.0), *seen[1:]])
    mine, others = told.scales(6)[0], told.scales(6)[1:]
    np.testing.assert_allclose(others, honest.scales(6)[1:], rtol=0.15)
    assert np.median(others) / 4 <= mine <= np.median(others) * 4


def test_it_survives_a_checkpoint():
    rng = np.random.default_rng(2)
    noise = GradientNoise().update([observation(n, 80.0, rng) for n in range(2)])
    kept = from_values(GradientNoise, to_values(noise))
    np.testing.assert_array_equal(kept.scales(2), noise.scales(2))


@given(
    batch_size=st.integers(1, 4096),
    noise_scale=st.floats(0, 1e5),
)
def test_steps_by_few_examples_are_shorter_by_the_root_of_the_signals_share(
    batch_size, noise_scale
):
    length = step_length(batch_size, noise_scale)
    assert 0 < length <= 1
    if batch_size >= 128 or noise_scale == 0:
        assert length == 1
    else:
        # Times what the gradient is longer by, it is as long as that of 128 examples.
        ratio = (1 + noise_scale / batch_size) / (1 + noise_scale / 128)
        assert length**2 * ratio == pytest.approx(1)
        assert length <= step_length(batch_size + 1, noise_scale)
