"""Models whose layers below a block cannot be run once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lola_flwr.device.prefix import ActivationCache, reused_prefix
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import partition_parameters
from tests.device.prefix.families import partition_of


class Skip(nn.Module):
    """Its last layer also reads what the first one gave."""

    def __init__(self, widths=(4, 4, 4)):
        super().__init__()
        sizes = [4, *widths]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(sizes, widths, strict=False)
        )

    def forward(self, x):
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first)) + first

    def loss(self, batch):
        return self(batch["x"]).square().mean()


def skip_gradient(model, loss_function=None, block_index=2):
    partition = partition_of(model)
    with reused_prefix(model, partition, block_index):
        return block_gradient(
            model,
            partition,
            block_index,
            {"x": torch.ones(2, 4)},
            loss_function=loss_function or (lambda model, batch: model.loss(batch)),
        )


def test_what_else_depends_on_the_layers_below_is_refused():
    with pytest.raises(UserError, match="by another way than through it"):
        skip_gradient(Skip())


def test_a_loss_that_is_no_number_is_no_sign_of_it():
    model = Skip()
    model.layers[2].bias.data.fill_(torch.nan)
    assert np.isnan(skip_gradient(model).loss)


class HeadBelow(nn.Module):
    """A norm that is registered behind the layers and runs before them, as BART's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        for layer in (self.norm, *self.layers):
            x = layer(x)
        return x

    loss = Skip.loss


def test_trained_weights_below_the_block_are_refused():
    with pytest.raises(
        UserError, match=r"norm\.weight belongs to the head, but runs before the block"
    ):
        skip_gradient(HeadBelow())


def test_a_layer_whose_output_wants_gradients_by_itself_is_no_such_weight():
    class Detached(nn.Linear):
        def forward(self, x):
            return (super().forward(x)).detach().requires_grad_()

    model = Skip()
    model.layers[0] = Detached(4, 4)
    model.forward = lambda x: model.layers[2](model.layers[1](model.layers[0](x)))
    assert np.isfinite(skip_gradient(model).loss)


class PositionsFirst(nn.Module):
    """Hidden states as XLNet has them: positions first, then samples."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)


@pytest.mark.parametrize("positions", [2, 3])
def test_hidden_states_without_a_row_for_each_sample_are_refused(positions):
    model = PositionsFirst()
    partition = partition_of(model)
    cache = ActivationCache(10**6)
    with (
        reused_prefix(model, partition, 2, cache),
        pytest.raises(UserError, match="not one row for each"),
    ):
        model(torch.ones(2, positions, 4))


class Capacity(nn.Linear):
    """Keeps from an evaluation how many samples it had, as NLLB-MoE's experts do."""

    def forward(self, x):
        self.ran = True
        if not self.training:
            self.capacity = len(x)
        return super().forward(x) * (torch.arange(len(x)) < self.capacity)[:, None]


def test_what_a_pass_below_leaves_behind_is_refused():
    model = HeadBelow()
    model.norm, model.layers[0] = nn.Identity(), Capacity(4, 4)
    model.layers[0].capacity = 8
    with pytest.raises(UserError, match=r"layers\.0\.capacity was 8 and is 2 after"):
        skip_gradient(model)
    # A flag, as of what is set up in the first pass, is no number to compute with.
    model.layers[0].ran = False
    assert np.isfinite(skip_gradient(model).loss)


def test_models_that_do_not_fit_are_refused(batch):
    with pytest.raises(UserError, match=r"\(2, 4\) became \(2, 1\)"):
        skip_gradient(Skip((1, 1, 1)))
    with pytest.raises(UserError, match="apart from the model itself"):
        skip_gradient(Skip(), lambda m, b: m.layers[2](m.layers[1](b["x"])).mean())
    named = Skip()
    named.layers[0].forward = lambda x: {"states": x}
    with pytest.raises(UserError, match=r"\(2, 4\) became dict\. Train"):
        skip_gradient(named)
    mixed = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    names = [n for n, _ in mixed.named_parameters()]
    blocks = partition_parameters(names, blocks=[r"\w\.weight", r"\w\.bias"])
    with pytest.raises(UserError, match="every block is one module"):
        reused_prefix(mixed, blocks, 1)
