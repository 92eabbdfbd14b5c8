"""PEQA: weights as whole numbers, whose scales are trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lola_flwr.device.prefix.streaming import (
    LayeredWeights,
    StreamedModel,
    save_base,
    skeleton_of,
)
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.stored_base import stored_values
from lola_flwr.zeroth_order.directions import Directions
from lola_flwr.zeroth_order.forward_mode import directional_derivatives
from lola_flwr.zeroth_order.projections import projected_gradients
from tests.model.test_own_tuners import (
    BATCH,
    adapted,
    kept_shapes,
    logits,
    moved,
    one_map,
    roberta,
)

pytestmark = pytest.mark.filterwarnings("ignore")

VARIANTS = [
    {},
    {"bits": 8},
    {"group_size": 3},
    {"bits": 8, "group_size": 1},
]


def differences(layer):
    """Return codes less zero points [out, groups, columns], read out of the bytes."""
    stored = layer.base_layer.weight.numpy().astype(int)
    if layer.bits == 4:
        stored = np.concatenate([stored % 16, stored // 16], 1)[:, : layer.in_features]
    zeros = layer.zeros.numpy().astype(int)
    return stored.reshape(*zeros.shape, -1) - zeros[:, :, None]


def linear_of(kind, features, outputs):
    torch.manual_seed(1)
    if kind == "conv1d":
        return Conv1D(outputs, features)
    return nn.Linear(features, outputs, bias=kind == "linear")


def weight_of(linear):
    """Return a map's weight as [out, in], in float64."""
    weight = linear.weight.detach().double().clone()
    return weight.T if isinstance(linear, Conv1D) else weight


@pytest.mark.parametrize("shape", [(9, 4), (3, 7)])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("options", VARIANTS)
def test_outputs_and_gradients_are_those_of_the_dequantised_weight(
    options, kind, shape
):
    features, outputs = shape
    layer = one_map("peqa", options, linear_of(kind, features, outputs))
    codes = torch.from_numpy(differences(layer)).double()
    with torch.no_grad():
        layer.trained.add_(torch.randn(layer.trained.shape))
    inputs = torch.randn(2, 3, features, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, outputs, dtype=torch.float64)

    def gradients(output, values):
        return torch.autograd.grad((weights * output.tanh()).sum(), [inputs, values])

    def plain(scales):
        matrix = (codes * scales[:, :, None]).reshape(outputs, features)
        return functional.linear(
            inputs, matrix, getattr(layer.base_layer, "bias", None)
        )

    values = (layer.steps * layer.trained).detach().requires_grad_()
    expected, of_inputs = plain(values), layer(inputs)
    torch.testing.assert_close(of_inputs, expected, rtol=1e-12, atol=1e-12)
    (own_inputs, own), (their_inputs, theirs) = (
        gradients(of_inputs, layer.trained),
        gradients(expected, values),
    )
    torch.testing.assert_close(own_inputs, their_inputs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(own, theirs * layer.steps, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), expected)
        layer.enable_adapters(False)
        torch.testing.assert_close(layer(inputs), plain(layer.steps))
        layer.enable_adapters(True)
    stored = layer.base_layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-12, atol=1e-12)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, stored)
    torch.testing.assert_close(layer(inputs), expected)


@pytest.mark.parametrize("options", VARIANTS)
def test_weights_are_rounded_to_the_nearest_code(options, rng):
    linear = nn.Linear(6, 40)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(rng.normal(0.3, 1, (40, 6))))
        linear.weight[0], linear.weight[1] = 0.0, -0.7
        linear.weight[2] = torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0, 2.0])
    weight = weight_of(linear)
    layer = one_map("peqa", options, linear)
    codes = differences(layer)
    groups = weight.numpy().reshape(codes.shape)
    lowest, highest = groups.min(2).clip(max=0), groups.max(2).clip(min=0)
    most = 2**layer.bits - 1
    steps = np.where(highest > lowest, (highest - lowest) / most, 1)[:, :, None]
    # All that codes can stand for, by brute force.
    zeros = layer.zeros.numpy().astype(int)[:, :, None, None]
    values = (np.arange(most + 1) - zeros) * steps[..., None]
    nearest = abs(values - groups[..., None]).min(-1)
    np.testing.assert_allclose(abs(codes * steps - groups), nearest, atol=1e-6)
    # Then the scale is the best there is for these codes.
    found = layer.steps.numpy()[:, :, None]
    error = np.square(codes * found - groups).sum(2)
    for factor in (0.999, 1.001, steps / found):
        other = np.square(codes * found * factor - groups).sum(2)
        assert (error <= other + 1e-12).all()
    np.testing.assert_allclose((codes * found - groups)[:3], 0, atol=1e-6)


def test_what_is_kept_of_a_map_is_its_codes():
    layer = one_map("peqa", {}, nn.Linear(64, 32))
    assert layer.base_layer.weight.nbytes == 64 * 32 // 2
    inputs = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    # What comes before the scale, and the scale; above the trained block that alone.
    assert set(kept_shapes(lambda: layer(inputs))[0]) == {(3, 32), (32,)}
    layer.trained.requires_grad_(False)
    shapes, output = kept_shapes(lambda: layer(inputs))
    assert set(shapes) == {(32,)}
    output.sum().backward()
    torch.testing.assert_close(inputs.grad, layer.adapted_matrix().sum(0).expand(3, 64))
    grouped = one_map("peqa", {"group_size": 32}, nn.Linear(64, 32))
    shapes, _ = kept_shapes(lambda: grouped(inputs))
    assert set(shapes) == {(3, 64), (32, 2)}


@pytest.mark.parametrize("options", [{}, {"group_size": 16}])
def test_autocast_computes_in_half_and_leaves_gradients_in_full(options):
    layer = one_map("peqa", options, nn.Linear(64, 64).float()).float()
    inputs = torch.randn(3, 64, requires_grad=True)
    found = []
    for half in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = layer(inputs)
        assert output.dtype == (torch.bfloat16 if half else torch.float32)
        loss = output.float().square().sum()
        found.append(torch.autograd.grad(loss, [inputs, layer.trained]))
    for own, full in zip(*found, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, full, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(("options", "most"), [({"bits": 8}, 0.002), ({}, 0.03)])
def test_the_model_begins_as_it_was_but_for_rounding(options, most):
    difference = abs(logits(adapted("peqa", options)) - logits(roberta())).max()
    assert 0 < difference < most


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_what_the_codes_stand_for_is_what_others_read(kind):
    """Such as OwLore, which looks for outliers."""
    linear = linear_of(kind, 6, 4)
    before = linear.weight.detach().double()
    layer = one_map("peqa", {"bits": 8}, linear)
    model = nn.ModuleDict({"map": layer})
    values = stored_values(model, "map.base_layer.weight")
    torch.testing.assert_close(values, before, rtol=0, atol=0.05)
    layer.merge()
    values = stored_values(model, "map.base_layer.weight")
    torch.testing.assert_close(values, before, rtol=0, atol=0.05)


def test_a_block_is_one_scale_a_row():
    model = adapted("peqa")
    for block in model_partition(model).blocks:
        rows = sum(model.get_parameter(name).numel() for name in block)
        assert rows == 5 * 16 + 32


class TestZerothOrder:
    """QZO: scales are moved, and losses compared."""

    def gradient_along(self, model, names, directions):
        """Return the gradient's products with the directions."""
        partition = model_partition(model)
        gradients = block_gradient(model.eval(), partition, 0, BATCH).gradients
        products = np.zeros(directions.count)
        for number in range(directions.count):
            for name in names:
                values = model.get_parameter(name).detach().numpy()
                signs = np.concatenate([*directions.along(number, name, values)])
                products[number] += signs @ gradients[name].numpy().reshape(-1)
        return products

    @pytest.mark.parametrize("options", [{}, {"bits": 8, "group_size": 8}])
    def test_losses_along_scales_differ_by_the_gradient(self, options):
        model = moved(adapted("peqa", options))
        names = model_partition(model).update_names(0)
        directions = Directions(7, 3, perturbation=3e-3)
        before = {n: model.get_parameter(n).detach().clone() for n in names}
        found, _ = projected_gradients(model, names, BATCH, directions=directions)
        for name, values in before.items():
            assert torch.equal(model.get_parameter(name), values)
        expected = self.gradient_along(model, names, directions)
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=2e-3)

    @pytest.mark.parametrize(
        ("tuning", "options"),
        [
            ("peqa", {}),
            ("peqa", {"bits": 8, "group_size": 8}),
            ("svfit", {}),
            ("lamda", {"r": 3}),
        ],
    )
    def test_derivatives_in_forward_mode_are_the_gradients(self, tuning, options):
        model = moved(adapted(tuning, options))
        names = model_partition(model).update_names(0)
        directions = Directions(7, 3, perturbation=0)
        found, _ = directional_derivatives(model, names, BATCH, directions=directions)
        expected = self.gradient_along(model, names, directions)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3 is to be 4 or 8"),
        ({"bits": "8"}, "bits='8' is to be 4 or 8"),
        ({"group_size": 5}, "group_size=5 is to be .* divides 16, the columns of the"),
        ({"group_size": 0}, "group_size=0 is to be a whole number"),
        ({"group_size": 2.0}, "group_size=2.0 is to be a whole number"),
        ({"target_modules": ["word_embeddings"]}, "of type Embedding, which is"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message) as raised:
        adapt(roberta(), "peqa", options)
    assert "\n" not in str(raised.value)


def test_weights_that_are_not_finite_are_refused():
    model = roberta()
    with torch.no_grad():
        model.roberta.encoder.layer[1].output.dense.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"not finite \(.*layer\.1\.output\.dense"):
        adapt(model, "peqa")


def test_a_matrix_of_two_modules_is_refused():
    model = roberta()
    first, second = (model.roberta.encoder.layer[i].output.dense for i in (0, 1))
    second.weight = first.weight
    with pytest.raises(
        UserError, match=r"0\.output.* and .*1\.output.* are one matrix"
    ):
        adapt(model, "peqa")


def test_a_model_whose_weights_are_on_a_disk_is_refused(tmp_path):
    whole = adapted("peqa")
    save_base(whole, tmp_path / "base")
    skeleton = skeleton_of(lambda: adapted("peqa"))
    weights = LayeredWeights(tmp_path / "base", tmp_path / "changed")
    with pytest.raises(UserError, match="computed from base weights"):
        StreamedModel(skeleton, model_partition(whole), weights)
