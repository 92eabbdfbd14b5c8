from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lola_flwr.costs.of_model import zeroth_order_costs
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.zeroth_order.directions import Directions
from lola_flwr.zeroth_order.forward_costs import forward_mode_costs
from lola_flwr.zeroth_order.forward_mode import directional_derivatives
from lola_flwr.zeroth_order.mixing import ZerothOrder
from simulations.compare.measure import counted_flops, peak_bytes
from tests.device.test_tokens import device_for, texts, trained
from tests.marks import rest_slow
from tests.model.test_recompute import TOKENS, adapted, decoder, gpt2
from tests.zeroth_order.test_zeroth_order import whole


def products(model, gradients, directions):
    """Return the products of gradients with directions."""
    values = dict(model.named_parameters())
    return [
        sum(
            float(
                gradient.double().numpy().reshape(-1)
                @ whole(directions, k, name, values[name].numpy(force=True))
            )
            for name, gradient in gradients.items()
        )
        for k in range(directions.count)
    ]


def language_case(make):
    model, labels = make()
    return model.eval(), {"input_ids": TOKENS, "labels": labels}


@pytest.mark.parametrize("make", rest_slow([None, decoder, adapted, gpt2], fast=1))
def test_projections_are_products_with_the_gradient(make, roberta, batch):
    model, batch = (roberta, batch) if make is None else language_case(make)
    model = model.double()
    partition = model_partition(model)
    # Not a multiple of those that go through a pass together.
    directions = Directions(7, 5, smallest_share=0.5, perturbation=0.0)
    for block in range(partition.num_blocks):
        names = partition.update_names(block)
        found, loss = directional_derivatives(
            model, names, batch, directions=directions
        )
        gradients = block_gradient(model, partition, block, batch).gradients
        wanted = products(model, gradients, directions)
        # They travel in float32, in which language models take their loss, too.
        tolerance = {"rtol": 2e-7} if make is None else {"rtol": 1e-5, "atol": 1e-6}
        np.testing.assert_allclose(found, np.float32(wanted), **tolerance)
        assert loss == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_the_model_stays_as_it_is(roberta, batch):
    roberta.requires_grad_(True)
    before = {n: p.detach().clone() for n, p in roberta.named_parameters()}
    partition = model_partition(roberta)
    names = partition.update_names(1)
    directions = Directions(7, 2, perturbation=0.0)
    directional_derivatives(roberta, names, batch, directions=directions)
    for name, parameter in roberta.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
        assert parameter.requires_grad


class Square(torch.autograd.Function):
    """An operation with a backward pass alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Net(nn.Module):
    def __init__(self, besides):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.besides = besides

    def forward(self, x):
        for layer in self.layers:
            x = self.besides(layer(x))
        return x


def test_what_has_no_forward_derivative_is_refused():
    net = Net(Square.apply)
    partition = partition_parameters(n for n, _ in net.named_parameters())
    with pytest.raises(UserError, match=r"Net has no forward-mode derivative.*pertur"):
        directional_derivatives(
            net,
            partition.update_names(0),
            {"x": torch.ones(2, 3)},
            directions=Directions(1, 2, perturbation=0.0),
            loss_function=lambda model, batch: model(**batch).sum(),
        )


def test_a_number_that_is_taken_out_has_no_derivative_as_in_back_propagation():
    net = Net(lambda x: x * x.sum().item()).double()
    partition = partition_parameters(n for n, _ in net.named_parameters())
    batch = {"x": torch.ones(2, 3).double()}
    directions = Directions(1, 2, perturbation=0.0)

    def loss(model, batch):
        return model(**batch).sum()

    names = partition.update_names(0)
    found, _ = directional_derivatives(
        net, names, batch, directions=directions, loss_function=loss
    )
    gradients = block_gradient(net, partition, 0, batch, loss_function=loss).gradients
    np.testing.assert_allclose(
        found, products(net, gradients, directions), rtol=1e-6, atol=1e-9
    )


def test_memory_that_does_not_suffice_stays_that():
    def besides(x):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    net = Net(besides)
    with pytest.raises(RuntimeError, match="allocate"):
        directional_derivatives(
            net,
            ["layers.0.weight"],
            {"x": torch.ones(2, 3)},
            directions=Directions(1, 2, perturbation=0.0),
            loss_function=lambda model, batch: model(**batch).sum(),
        )


@pytest.mark.slow
def test_costs_are_what_it_takes(roberta, batch):
    partition = model_partition(roberta)
    sizes = {"batch_size": 6, "sequence_length": 10}
    directions = Directions(1, 6, perturbation=0.0)
    options = {**sizes, "num_directions": 6}
    costs = forward_mode_costs(roberta, partition, **options)
    compared = zeroth_order_costs(roberta, partition, **options)
    held = sum(p.nbytes for p in roberta.parameters())
    held += sum(b.nbytes for b in roberta.buffers())
    inputs = sum(values.nbytes for values in batch.values())
    for block in range(partition.num_blocks):
        arguments = (roberta, partition.update_names(block), batch)
        _, flops = counted_flops(
            lambda given=arguments: directional_derivatives(
                *given, directions=directions
            )
        )
        peak = peak_bytes(
            roberta,
            lambda given=arguments: directional_derivatives(
                *given, directions=directions
            ),
        )
        assert costs.flops[block] == pytest.approx(flops, rel=0.02)
        assert costs.memory_bytes[block] == pytest.approx(held + inputs + peak, rel=0.1)
    assert (np.diff(costs.flops) < 0).all()
    # Several directions share what does not depend on them.
    assert costs.flops[-1] < 0.7 * compared.flops[-1]
    np.testing.assert_array_equal(costs.payload_bits, compared.payload_bits)


def test_a_device_that_is_to_move_nothing_sends_derivatives(roberta):
    asked = {"direction_seed": 3, "num_directions": 5, "smallest_share": 1.0}
    device = device_for(roberta, texts())
    near = trained(device, roberta, perturbation=1e-3, **asked).report
    exact = trained(device, roberta, perturbation=0.0, **asked).report
    assert exact.update_kind == "zeroth-order"
    found, other = (
        np.frombuffer(report.projections, "<f4") for report in (exact, near)
    )
    assert exact.projections != near.projections
    np.testing.assert_allclose(found, other, rtol=0.05, atol=5e-4)
    assert trained(device, roberta, perturbation=0.0, **asked).report == exact


def test_a_step_must_not_be_negative():
    assert ZerothOrder(costs=None, perturbation=0.0).perturbation == 0
    with pytest.raises(UserError, match=r"perturbation=-0\.1 not negative"):
        ZerothOrder(costs=None, perturbation=-0.1)
