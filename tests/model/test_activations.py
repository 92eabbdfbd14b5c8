from __future__ import annotations

import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

from lola_flwr.build import RoundSettings, coordinator_for
from lola_flwr.costs.memory import Levers
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.model.activations import kept_suffix, quantised_suffix
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import block_gradient, train_mode
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.precision import autocast
from lola_flwr.model.recompute import recomputed_suffix
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.packing import GRADIENTS
from simulations.benchmarks.cost_cases import CASES
from simulations.benchmarks.counted_costs import compare
from tests.device.test_tokens import device_for, texts, trained
from tests.marks import rest_slow
from tests.model.test_recompute import TOKENS, adapted, classifier, decoder, gpt2

CPU = torch.device("cpu")


def batch_for(labels):
    mask = torch.ones_like(TOKENS)
    mask[0, -3:] = 0
    return {"input_ids": TOKENS, "attention_mask": mask, "labels": labels}


def flat(found):
    return torch.cat([values.flatten() for values in found.gradients.values()])


def relative_error(found, exact):
    return float((flat(found) - flat(exact)).norm() / flat(exact).norm())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "make", rest_slow([classifier, decoder, adapted, gpt2], fast=2)
)
def test_the_loss_is_the_same_and_the_gradient_near(make, precision):
    torch.manual_seed(3)
    model, labels = make()
    train_mode(model)
    partition = model_partition(model)
    batch = batch_for(labels)
    before = {n: vars(m).get("forward") for n, m in model.named_modules()}
    packed = []

    def rounding(values):
        packed.append(values.numel())
        return values.round_()

    for block in range(partition.num_blocks):
        torch.manual_seed(7)
        with autocast(precision, CPU):
            exact = block_gradient(model, partition, block, batch)
        packed.clear()
        torch.manual_seed(7)
        with (
            autocast(precision, CPU),
            quantised_suffix(model, partition, block, rounding=rounding),
        ):
            found = block_gradient(model, partition, block, batch)
        assert found.loss == exact.loss
        assert packed
        assert 0 < relative_error(found, exact) < 0.05
    after = {n: vars(m).get("forward") for n, m in model.named_modules()}
    assert after == before


def test_layers_below_the_block_and_the_head_are_left_alone():
    model, labels = classifier()
    train_mode(model)
    partition = model_partition(model)
    counts = []
    for block in range(partition.num_blocks):
        packed = []
        with quantised_suffix(
            model, partition, block, rounding=lambda v, p=packed: (p.append(1), v)[1]
        ):
            block_gradient(model, partition, block, batch_for(labels))
        counts.append(len(packed))
    first, second, last = counts
    assert first > second > last > 0
    assert first - second == second - last
    torch.manual_seed(7)
    exact = block_gradient(model, partition, 2, batch_for(labels)).gradients
    torch.manual_seed(7)
    with quantised_suffix(model, partition, 2):
        found = block_gradient(model, partition, 2, batch_for(labels)).gradients
    for name in partition.head:
        assert torch.equal(found[name], exact[name]), name


class Layer(nn.Module):
    """A layer that does what it is given."""

    def __init__(self, compute, width=32):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.compute = compute

    def forward(self, x):
        return x + self.compute(self, x)


class Net(nn.Module):
    def __init__(self, compute, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(compute, width) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def rounded(compute, width=32, *, inputs=None):
    """Return what is quantised of the last layer, and the error of its gradient."""
    net = Net(compute, width)
    partition = partition_parameters(n for n, _ in net.named_parameters())
    given = torch.randn(2, 6, width) if inputs is None else inputs
    seen = []

    def rounding(values):
        seen.append(values.reshape(values.shape[0], -1))
        return values.round_()

    def loss(model, batch):
        return model(**batch).square().sum()

    options = {"loss_function": loss}
    torch.manual_seed(1)
    exact = block_gradient(net, partition, 1, {"x": given}, **options)
    torch.manual_seed(1)
    with quantised_suffix(net, partition, 1, rounding=rounding):
        found = block_gradient(net, partition, 1, {"x": given}, **options)
    return seen, relative_error(found, exact)


def test_what_is_saved_twice_is_packed_once():
    def three_maps(layer, x):
        return sum(inner(x) for inner in layer.inner)

    seen, error = rounded(three_maps)
    assert len(seen) == 1
    assert error < 0.02


def test_what_changed_in_place_in_between_is_packed_again():
    def changed(layer, x):
        first = x.clone()
        a = layer.inner[0](first)
        with torch.no_grad():
            first.mul_(3)  # PyTorch itself would refuse the first product's gradient
        return a + layer.inner[1](first) + layer.inner[2](x)

    net = Net(changed)
    partition = partition_parameters(n for n, _ in net.named_parameters())
    x = torch.randn(5, 32)

    def loss(model, batch):
        return model(**batch).sum()

    with quantised_suffix(net, partition, 1):
        found = block_gradient(net, partition, 1, {"x": x}, loss_function=loss)
    once, three = (found.gradients[f"layers.1.inner.{i}.weight"] for i in (0, 1))
    torch.testing.assert_close(three, 3 * once, rtol=0.01, atol=0.05)


def test_weights_and_what_is_made_of_them_alone_stay():
    def scaled(layer, x):
        weight = layer.inner[0].weight / layer.inner[1].weight.norm()
        return (x @ weight.T.to(torch.float64).to(torch.float32)).sin()

    seen, _ = rounded(scaled)
    assert len(seen) == 2  # what goes in, and the argument of the sine


def test_masks_numbers_of_rows_and_statistics_stay():
    mask = torch.full((6, 6), -torch.inf).triu(1)

    def attends(layer, x):
        q, k, v = (inner(x).view(2, 6, 2, 16).transpose(1, 2) for inner in layer.inner)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = nn.functional.layer_norm(out.transpose(1, 2).reshape(2, 6, 32), (32,))
        picked = out[:, torch.tensor([0, 0, 1, 2, 3, 4])]
        return torch.where(picked > 0, picked, 0.1 * picked)

    seen, error = rounded(attends)
    # What goes in; queries, keys, values, what comes out, and that in rows.
    assert len(seen) == 6
    assert all(torch.isfinite(values).all() for values in seen)
    assert error < 0.03


class Keep(torch.autograd.Function):
    """Saves something, and shows what it is given back."""

    shown: list

    @staticmethod
    def forward(ctx, x, kept):
        ctx.save_for_backward(kept)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Keep.shown.append(ctx.saved_tensors[0])
        return gradient, None


def brought_back(values):
    """Return what the backward pass of a quantised layer finds in place of values."""
    net = Net(lambda layer, x: Keep.apply(layer.inner[0](x), values))
    partition = partition_parameters(n for n, _ in net.named_parameters())

    def loss(model, batch):
        return model(**batch).sum()

    Keep.shown = []
    with quantised_suffix(net, partition, 1):
        block_gradient(net, partition, 1, {"x": torch.ones(2, 32)}, loss_function=loss)
    (found,) = Keep.shown
    return found


def test_what_dropout_multiplies_by_comes_back_and_zeros_of_relu():
    kept = torch.nn.functional.dropout(torch.ones(7, 256), 0.1)
    torch.testing.assert_close(brought_back(kept), kept, rtol=1e-6, atol=0.0)
    positive = torch.randn(7, 256).relu()
    assert (brought_back(positive)[positive == 0] == 0).all()


@given(
    st.permutations(range(4)),
    st.tuples(*[st.integers(1, 4)] * 3, st.sampled_from([16, 17, 256, 300])),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_layout_comes_back(order, sizes, expanded, sliced, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sizes, generator=generator).to(dtype)
    if expanded < 3:
        values = values.narrow(expanded, 0, 1).expand(sizes)
    if sliced and values.shape[0] > 1:
        values = values[1:]
    values = values.permute(order)
    found = brought_back(values)
    assert (found.shape, found.dtype) == (values.shape, values.dtype)
    step = float(values.max() - values.min()) / 255
    slack = 2**-7 * float(values.abs().max()) if dtype == torch.bfloat16 else 1e-6
    assert float((found - values).abs().max()) <= step / 2 + slack


@pytest.mark.parametrize("value", [0.0, 0.3, -1e-40, 3e38])
def test_numbers_that_are_all_the_same_come_back(value):
    values = torch.full((3, 32), value)
    assert torch.equal(brought_back(values), values)


def test_layers_that_run_twice_keep_what_goes_in_as_it_is():
    model, labels = classifier()
    train_mode(model)
    partition = model_partition(model)
    found = []
    for context in (
        recomputed_suffix(model, partition, 0),
        kept_suffix(model, partition, 0, "int8", recompute=True),
    ):
        torch.manual_seed(7)
        with context:
            found.append(flat(block_gradient(model, partition, 0, batch_for(labels))))
    assert torch.equal(*found)


def test_an_unknown_way_is_refused(roberta):
    with pytest.raises(UserError, match=r"activations='int4'.*exact, int8"):
        kept_suffix(roberta, model_partition(roberta), 0, "int4", recompute=False)


# --- what it takes -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", rest_slow([name for name in CASES if "RoBERTa" in name or "LM" in name], 1)
)
def test_what_is_counted_is_what_pytorch_allocates(name):
    if "nf4" in name or "int8" in name:
        pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = compare(CASES[name], activations="int8")
    for row in rows:
        assert row.step_ratio == pytest.approx(1, abs=0.05)
        assert row.flops_ratio == pytest.approx(1, abs=0.04)


def classifier_of(width):
    import transformers as hf

    config = hf.RobertaConfig(
        vocab_size=60,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=width // 32,
        num_hidden_layers=3,
        max_position_embeddings=40,
    )
    with torch.device("meta"):
        return hf.RobertaForSequenceClassification(config)


def both_costs(model, **sizes):
    partition = model_partition(model)
    return [
        model_costs(model, partition, **sizes, activations=way)
        for way in ("exact", "int8")
    ]


@pytest.mark.slow
def test_a_layer_keeps_at_most_0_35_of_the_bytes():
    exact, int8 = both_costs(classifier_of(128), batch_size=8, sequence_length=32)
    kept, packed = (-np.diff(costs.step.whole_bytes) for costs in (exact, int8))
    assert (packed / kept).max() < 0.35
    np.testing.assert_array_equal(exact.payload_bits, int8.payload_bits)
    # What layers take that run twice is the same: they keep nothing in 8 bits.
    twice = [
        costs.step.peak_bytes(Levers(8, recompute_suffix=True))
        for costs in (exact, int8)
    ]
    np.testing.assert_array_equal(*twice)


@pytest.mark.slow
def test_a_device_of_small_memory_is_given_a_block_that_it_could_not_have():
    model = classifier_of(128)
    partition = model_partition(model)
    sizes = {"batch_size": 16, "sequence_length": 32}
    exact, int8 = both_costs(model, **sizes)
    # Enough for all blocks but the first.
    memory_bytes = exact.memory_bytes[:2].mean()
    assert int8.memory_bytes[0] < memory_bytes
    held, latencies_s = [], []
    for costs in (exact, int8):
        coordinator = coordinator_for(
            classifier_with_values(),
            partition,
            costs=costs,
            batch_size=16,
            settings=RoundSettings(),
        )
        # One has the memory, and is slow.
        for index, memory in enumerate([1e9, memory_bytes, memory_bytes]):
            profile = DeviceProfile(
                name=f"d{index}",
                flops_per_s=1e9 if index else 1e7,
                memory_bytes=memory,
                snr_db=10.0,
            )
            coordinator.add_device(str(index), profile.to_properties())
        plan = coordinator.plan_round(1, ["0", "1", "2"])
        held.append({d: a.blocks for d, a in plan.assignments.items()})
        latencies_s.append(plan.allocation.round_s)
    assert 0 in held[0]["0"]
    assert 0 in held[1]["1"] + held[1]["2"]
    assert latencies_s[1] < latencies_s[0]


def classifier_with_values():
    return classifier_of(128).to_empty(device="cpu")


def test_a_device_computes_so(roberta):
    exact, int8 = (
        trained(device_for(roberta, texts(), activations=way), roberta).arrays[
            GRADIENTS
        ]
        for way in ("exact", "int8")
    )
    assert 0 < np.linalg.norm(int8 - exact) < 0.05 * np.linalg.norm(exact)


def test_layers_that_run_in_part_are_refused(roberta):
    device = device_for(roberta, texts(), activations="int8")
    with pytest.raises(UserError, match="reduced-schedules"):
        trained(device, roberta, operations="off")
