"""Costs that were counted for a large batch, at smaller ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.costs.estimated import BlockCosts, estimate_costs
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.system.devices import simulated_device
from tests.marks import rest_slow

LARGEST, TOKENS = 64, 10


@pytest.fixture(params=rest_slow(["estimated", "counted"]))
def costs_of(request, roberta):
    partition = model_partition(roberta)
    if request.param == "counted":

        def counted(batch_size: int, **options) -> BlockCosts:
            return model_costs(
                roberta,
                partition,
                batch_size=batch_size,
                sequence_length=TOKENS,
                **options,
            )

        return counted
    shapes = {name: tuple(p.shape) for name, p in roberta.named_parameters()}

    def estimated(batch_size: int, micro_batch_size: int = 0) -> BlockCosts:
        if micro_batch_size:
            pytest.skip("micro-batches are counted")
        return estimate_costs(
            shapes, partition, batch_size=batch_size, sequence_length=TOKENS
        )

    return estimated


@pytest.mark.parametrize(("batch_size", "micro"), [(8, 0), (16, 4)])
def test_costs_at_a_smaller_batch_are_those_that_are_counted_for_it(
    costs_of, batch_size, micro
):
    most = costs_of(LARGEST, micro_batch_size=micro)
    found = most.at(batch_size)
    counted = costs_of(batch_size, micro_batch_size=micro)
    np.testing.assert_allclose(found.flops, counted.flops)
    np.testing.assert_array_equal(found.payload_bits, counted.payload_bits)
    for mine, its in ((found, counted), *_joined(found, counted)):
        # Between one example and all it is a straight line, and never less.
        assert (mine.memory_bytes >= its.memory_bytes * (1 - 1e-9)).all()
        np.testing.assert_allclose(mine.memory_bytes, its.memory_bytes, rtol=0.15)
        np.testing.assert_allclose(mine.flops, its.flops)
    assert most.at(LARGEST) is most


def _joined(found: BlockCosts, counted: BlockCosts):
    spans = [(0, 1)]
    yield found.joined(spans), counted.joined(spans)


def test_a_device_that_computes_twice_needs_less_for_fewer_examples(costs_of):
    most, device = costs_of(LARGEST), simulated_device(0, seed=0)
    twice = replace(device, memory_bytes=1e5, recomputes_suffix=True)
    few, many = (most.at(size).required_bytes([twice]) for size in (4, 32))
    assert (few < many).all()
    assert (most.at(4).required_bytes([twice]) <= few).all()


def test_steps_of_a_size_of_their_own_cost_what_that_costs(costs_of):
    most, device = costs_of(LARGEST), simulated_device(0, seed=0)
    device = replace(device, memory_bytes=1e5, recomputes_suffix=True)
    sizes = {4: 4, 32: 32, LARGEST: LARGEST, 10 * LARGEST: LARGEST}
    fleet = [device, *(replace(device, batch_size=size) for size in sizes)]
    for of_run in (16, 32, LARGEST):
        costs = most.at(of_run)
        for row, size in enumerate((of_run, *sizes.values())):
            for found, expected in (
                (costs.required_flops(fleet), most.at(size).required_flops([device])),
                (costs.required_bytes(fleet), most.at(size).required_bytes([device])),
            ):
                np.testing.assert_array_equal(found[row], expected[0])


def test_what_is_not_known_is_refused(costs_of):
    most = costs_of(LARGEST)
    for costs, size in ((most, 128), (replace(most, example_flops=None), 8)):
        with pytest.raises(UserError, match=f"a batch of {size} costs is not known"):
            costs.at(size)
