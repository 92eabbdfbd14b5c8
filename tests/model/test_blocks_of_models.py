"""Blocks told by names are those that run, in order, with the right gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from lola_flwr.model.backprop import block_gradient, model_loss
from lola_flwr.model.blocks import BlocksNotFound, partition_parameters
from tests.model.block_cases import (
    CASES,
    RegisteredLate,
    batch_of,
    built,
    module_of,
    modules_of,
)


def loss_of(model, batch):
    if "input" in batch:
        return nn.functional.cross_entropy(model(batch["input"]), batch["labels"])
    return model_loss(model, batch)


def running_times(model, batch):
    """Trace one forward pass: module -> when it began to run, each time."""
    times = {}
    clock = iter(range(10**6))

    def note(module):
        return lambda *_: times.setdefault(module, []).append(next(clock))

    handles = [
        model.get_submodule(module).register_forward_pre_hook(note(module))
        for module in modules_of(name for name, _ in model.named_parameters())
    ]
    loss_of(model, batch)
    for handle in handles:
        handle.remove()
    return times


def check_against_trace(partition, times, frozen_behind="nothing"):
    trained = [
        [time for module in modules_of(names) for time in times[module]]
        for names in (*partition.blocks, partition.head)
        if names
    ]
    for earlier, later in pairwise(trained):
        assert max(earlier) < min(later)
    # Whatever runs only behind the last block is the head.
    last = max(time for name in partition.blocks[-1] for time in times[module_of(name)])
    behind = {module for module, seen in times.items() if min(seen) > last}
    frozen = behind - modules_of(partition.head)
    assert all(module.startswith(frozen_behind) for module in frozen)


@pytest.mark.parametrize("name", CASES)
def test_blocks_run_in_order_and_the_head_behind_them(name):
    case = CASES[name]
    model, batch = built(case)
    names = [n for n, _ in model.named_parameters()]

    partition = partition_parameters(names, **case.by_hand)

    assert partition.num_blocks == case.num_blocks
    assert modules_of(partition.head) == case.head
    assert sorted([*partition.trainable, *partition.frozen]) == sorted(names)
    times = running_times(model, batch)
    check_against_trace(partition, times, case.frozen_behind)


@pytest.mark.parametrize("name", CASES)
def test_every_blocks_gradient_is_that_of_full_back_propagation(name):
    case = CASES[name]
    model, batch = built(case)
    parameters = dict(model.named_parameters())
    partition = partition_parameters(parameters, **case.by_hand)
    full = torch.autograd.grad(
        loss_of(model, batch),
        list(parameters.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    expected = dict(zip(parameters, full, strict=True))
    for index in range(partition.num_blocks):
        result = block_gradient(model, partition, index, batch, loss_function=loss_of)
        assert list(result.gradients) == list(partition.update_names(index))
        for parameter, gradient in result.gradients.items():
            torch.testing.assert_close(gradient, expected[parameter])
        assert any(expected[n].any() for n in partition.blocks[index])


def test_the_trace_sees_a_wrong_partition():
    # The check must be able to fail: here the order of the names misleads.
    model = RegisteredLate()
    names = [name for name, _ in model.named_parameters()]
    partition = partition_parameters(names, blocks="early|late")
    times = running_times(model, batch_of("tensor"))
    with pytest.raises(AssertionError):
        check_against_trace(partition, times)


def test_modules_registered_out_of_order_are_given_by_hand():
    model = RegisteredLate()
    names = [name for name, _ in model.named_parameters()]
    in_order = [n for n in names if "fc" not in n] + [n for n in names if "fc" in n]
    partition = partition_parameters(in_order, blocks=["early", "late"])
    assert partition.head == ("fc.weight", "fc.bias")
    check_against_trace(partition, running_times(model, batch_of("tensor")))


@pytest.mark.parametrize("name", ["vit", "resnet by stages"])
def test_a_state_dict_gives_the_blocks_of_the_model(name):
    case = CASES[name]
    model = case.make()
    of_model = partition_parameters(
        (n for n, _ in model.named_parameters()), **case.by_hand
    )
    of_state = partition_parameters(model.state_dict(), **case.by_hand)
    assert of_state.trainable == of_model.trainable


def test_the_order_of_a_safetensors_file_is_refused():
    # The alphabet puts "classifier" in front of "roberta": it would count as frozen.
    names = [n for n, _ in CASES["roberta"].make().named_parameters()]
    with pytest.raises(BlocksNotFound, match="alphabetical order"):
        partition_parameters(sorted(names))
    with pytest.raises(BlocksNotFound, match=r"numbered \[0, 1, 10, 2, 3"):
        partition_parameters(sorted(f"layers.{index}.w" for index in range(11)))
