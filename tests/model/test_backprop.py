from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from lola_flwr.costs.counter import saved_bytes
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.model.backprop import (
    block_gradient,
    model_loss,
    only_block_trainable,
    train_mode,
)
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import load_classifier
from lola_flwr.model.recording import NoGradient


def full_gradients(model, batch):
    model.requires_grad_(True)
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block_index", [0, 1, 2])
def test_equals_full_backpropagation(roberta, batch, block_index, training):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    roberta.train(training)
    torch.manual_seed(3)
    expected = full_gradients(roberta, batch)
    torch.manual_seed(3)
    expected_loss = roberta(**batch).loss.item()
    torch.manual_seed(3)
    result = block_gradient(roberta, partition, block_index, batch)

    assert tuple(result.gradients) == partition.update_names(block_index)
    assert result.num_examples == 6
    assert result.loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in result.gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
        assert gradient.abs().sum() > 0 or "key.bias" in name


SOME = [(0, 2), *(pytest.param(n, marks=pytest.mark.slow) for n in [(0, 1), (0, 1, 2)])]


@pytest.mark.parametrize("blocks", SOME)
def test_several_blocks_have_the_gradients_that_each_has(roberta, batch, blocks):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    roberta.eval()
    together = block_gradient(roberta, partition, blocks, batch)
    assert tuple(together.gradients) == partition.update_names(*blocks)
    expected = full_gradients(roberta, batch)
    for block in blocks:
        alone = block_gradient(roberta, partition, block, batch)
        assert together.loss == alone.loss
        for name, gradient in alone.gradients.items():
            assert torch.equal(together.gradients[name], gradient), name
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_of_several_blocks_each_needs_a_gradient():
    model = nn.ModuleDict({"layer": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    partition = partition_parameters(n for n, _ in model.named_parameters())

    def skipping_one(model, batch):
        return model["layer"][2](model["layer"][0](batch["x"])).sum()

    with pytest.raises(NoGradient, match="No parameter of block 1"):
        block_gradient(
            model,
            partition,
            [0, 1],
            {"x": torch.ones(2, 2)},
            loss_function=skipping_one,
        )


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5, 6, 100])
def test_micro_batches_give_the_gradient_of_the_whole(roberta, batch, micro_batch_size):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    sizes = []

    def loss_function(model, batch):
        sizes.append(len(batch["labels"]))
        return model_loss(model, batch)

    whole = block_gradient(roberta, partition, 1, batch)
    pieces = block_gradient(
        roberta,
        partition,
        1,
        batch,
        loss_function=loss_function,
        micro_batch_size=micro_batch_size,
    )
    assert sum(sizes) == 6
    assert max(sizes) <= micro_batch_size
    assert len(sizes) == math.ceil(6 / micro_batch_size)
    assert pieces.num_examples == 6
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, gradient in pieces.gradients.items():
        torch.testing.assert_close(
            gradient, whole.gradients[name], rtol=1e-4, atol=1e-7
        )


def test_micro_batches_that_weigh_nothing_are_left_out(roberta, batch):
    """As a causal model's do, in which every token belongs to a prompt."""
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    counted = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0])

    def weight(part):
        return float(part["counted"].sum())

    def loss_function(model, part):
        logits = model(part["input_ids"], part["attention_mask"]).logits
        losses = nn.functional.cross_entropy(logits, part["labels"], reduction="none")
        return (losses * part["counted"]).sum() / weight(part)

    one, whole = (
        block_gradient(
            roberta,
            partition,
            1,
            {**batch, "counted": counted},
            loss_function=loss_function,
            micro_batch_size=size,
            batch_weight=weight,
        )
        for size in (2, 6)
    )
    assert one.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(
            gradient, whole.gradients[name], rtol=1e-4, atol=1e-7
        )


def test_one_micro_batch_is_kept_at_a_time(roberta, batch):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    kept = weakref.WeakSet()
    alive_before = []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.add(self)

    def loss_function(model, batch):
        alive_before.append(len(kept))
        loss = model_loss(model, batch)
        assert kept
        return loss

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        block_gradient(
            roberta,
            partition,
            0,
            batch,
            loss_function=loss_function,
            micro_batch_size=2,
        )
    assert alive_before == [0, 0, 0]


def test_nothing_below_the_block_is_recorded(roberta, batch):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    outputs = {}
    for index, layer in enumerate(roberta.roberta.encoder.layer):
        layer.register_forward_hook(
            lambda _m, _i, output, index=index: outputs.__setitem__(
                index, output[0] if isinstance(output, tuple) else output
            )
        )
    with only_block_trainable(roberta, partition, 1):
        roberta(**batch)
    assert not outputs[0].requires_grad
    assert outputs[0].grad_fn is None
    assert outputs[1].requires_grad


# RoBERTa-base shape, batch 16 x 64 tokens: MiB of saved activations by depth, without
# dropout, as measured independently of this code.
PUBLISHED_MIB = {1: 48, 2: 78, 4: 138, 6: 198, 8: 259, 10: 319, 12: 379}


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [False, True])
def test_saved_activations_are_those_of_the_table_and_of_the_cost_model(dropout):
    model, _ = load_classifier("random:roberta-base", num_labels=2)
    model.train(dropout)
    partition = partition_parameters(n for n, _ in model.named_parameters())
    input_ids = torch.randint(5, 30000, (16, 64))
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.zeros(16, dtype=torch.long),
    }
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    costs = estimate_costs(
        shapes,
        partition,
        batch_size=16,
        sequence_length=64,
        dropout_heads=12 if dropout else 0,
    )
    for depth in (1, 6, 12):
        index = 12 - depth

        def forward(index=index):
            with only_block_trainable(model, partition, index):
                model(**batch)

        measured_mib = saved_bytes(model, forward) / 2**20
        if not dropout:
            assert measured_mib == pytest.approx(PUBLISHED_MIB[depth], rel=0.10)
        # Besides, one hidden state is on its way back.
        estimated = 16 * (costs.step.pass_bytes.per_sequence[index] - 4 * 64 * 768)
        assert estimated / 2**20 == pytest.approx(measured_mib, rel=0.10)


def test_gradients_of_the_caller_are_left_alone(roberta, batch):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    name = partition.blocks[1][0]
    own = torch.ones_like(roberta.get_parameter(name))
    roberta.get_parameter(name).grad = own
    expected = block_gradient(roberta, partition, 1, batch).gradients[name].clone()
    assert roberta.get_parameter(name).grad is own
    assert torch.equal(own, torch.ones_like(own))
    again = block_gradient(roberta, partition, 1, batch).gradients[name]
    torch.testing.assert_close(again, expected)


def test_flags_are_restored(roberta, batch):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    # Of each kind some are frozen and some are not: embeddings, blocks and head.
    for frozen in list(roberta.parameters())[::3]:
        frozen.requires_grad_(False)
    before = [p.requires_grad for p in roberta.parameters()]
    block_gradient(roberta, partition, 2, batch)
    assert [p.requires_grad for p in roberta.parameters()] == before
    with pytest.raises(RuntimeError), only_block_trainable(roberta, partition, 0):
        raise RuntimeError
    assert [p.requires_grad for p in roberta.parameters()] == before
    assert all(p.grad is None for p in roberta.parameters())


def test_what_the_loss_does_not_depend_on_has_a_gradient_of_zeros(roberta, batch):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())

    def without_head(model, batch):
        hidden = model.roberta(batch["input_ids"], batch["attention_mask"])[0]
        return hidden.square().mean()

    found = block_gradient(roberta, partition, 1, batch, loss_function=without_head)
    assert tuple(found.gradients) == partition.update_names(1)
    for name, gradient in found.gradients.items():
        assert gradient.shape == roberta.get_parameter(name).shape
        if name in partition.head:
            assert torch.equal(gradient, torch.zeros_like(gradient))
        elif "key.bias" not in name:
            assert torch.any(gradient != 0), name


def test_inputs_that_want_a_gradient_are_given_none(roberta, batch):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    inputs = torch.randn(6, 10, 16, requires_grad=True)
    batch = {"inputs_embeds": inputs, "labels": batch["labels"]}
    block_gradient(roberta, partition, 1, batch)
    assert inputs.grad is None


def test_a_block_that_the_loss_does_not_depend_on_is_named(roberta, batch):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())

    def head_alone(model, batch):
        return model.classifier(torch.ones(1, 1, 16)).sum()

    name = partition.blocks[1][0]
    with pytest.raises(NoGradient, match=rf"No parameter of block 1 \({name}, "):
        block_gradient(roberta, partition, 1, batch, loss_function=head_alone)


class Broken(torch.autograd.Function):
    """Passes a loss on, and fails on the way back."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("a fault of the model's own")


def test_errors_on_the_way_back_are_the_model_s_own(roberta, batch):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    with pytest.raises(RuntimeError, match=r"a fault of the model's own"):
        block_gradient(
            roberta,
            partition,
            1,
            batch,
            loss_function=lambda model, batch: Broken.apply(model(**batch).loss),
        )
    assert all(p.grad is None and p.requires_grad for p in roberta.parameters())


def test_training_mode_leaves_running_statistics_as_they_are():
    untracked = nn.BatchNorm1d(4, track_running_stats=False)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), untracked, nn.Dropout()
    ).eval()
    train_mode(model)
    assert [m.training for m in model] == [True, False, True, True]
    assert model.training
    model(torch.randn(8, 3))
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_a_forgotten_preparation_does_not_undo_the_next(roberta):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    prepared = only_block_trainable(roberta, partition, 0)
    prepared.__enter__()
    following = only_block_trainable(roberta, partition, 2)
    trainable = following.__enter__()
    del prepared
    gc.collect()
    wanted = {n for n, p in roberta.named_parameters() if p.requires_grad}
    assert wanted == set(trainable)


@pytest.mark.parametrize("block_index", [-1, 3])
def test_unknown_block(roberta, batch, block_index):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    with pytest.raises(IndexError, match=f"block_index={block_index} .* blocks 0 to 2"):
        block_gradient(roberta, partition, block_index, batch)
