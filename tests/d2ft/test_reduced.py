from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lola_flwr.costs.of_model import model_costs
from lola_flwr.d2ft.operations import Operation, from_text, to_text
from lola_flwr.d2ft.reduced import reduced_costs, reduced_schedule
from lola_flwr.d2ft.training import reduced_gradient
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import partition_parameters
from tests.d2ft.cases import make
from tests.marks import rest_slow
from tests.model.test_backprop import saved_bytes

SKIP, FORWARD, FULL = Operation.SKIP, Operation.FORWARD, Operation.FULL


def allowed(operations, block, budget, kept):
    compute = sum(
        3 if layer == block else operation for layer, operation in enumerate(operations)
    )
    return (
        operations[block] == FULL
        and all(operation != FULL for operation in operations[:block])
        and compute <= budget
        and operations[block + 1 :].count(FULL) <= kept
    )


def test_equals_brute_force(rng):
    every = [tuple(map(Operation, ops)) for ops in product(range(3), repeat=5)]
    for _ in range(60):
        block, budget = int(rng.integers(5)), int(rng.integers(3, 14))
        kept = int(rng.integers(0, 6))
        forward, backward = rng.random(5), rng.random(5)

        def worth(operations, forward=forward, backward=backward):
            return sum(
                forward[layer] * (op >= FORWARD) + backward[layer] * (op == FULL)
                for layer, op in enumerate(operations)
            )

        best = max(worth(ops) for ops in every if allowed(ops, block, budget, kept))
        found = reduced_schedule(
            5,
            block,
            compute_budget=budget,
            kept_layers=kept,
            forward_worth=forward,
            backward_worth=backward,
        )
        assert allowed(found, block, budget, kept)
        assert worth(found) == pytest.approx(best)


def test_all_of_the_budget_runs_everything():
    # Six layers forward, three on the way back to block 4 of 6 and its weights.
    everything = (FORWARD,) * 4 + (FULL, FULL)
    assert reduced_schedule(6, 4, compute_budget=6 + 2 + 1) == everything
    with pytest.raises(UserError, match=r"less than the 3"):
        reduced_schedule(6, 4, compute_budget=2)


@pytest.mark.parametrize("family", ["roberta", "vit", "distilbert"])
def test_nothing_left_out_is_the_gradient_itself(family):
    case = make(family)
    expected = block_gradient(case.model, case.partition, 1, case.batch)
    result = reduced_gradient(
        case.model, case.partition, 1, case.batch, (FORWARD, FULL, FULL)
    )
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            result.gradients[name], gradient, rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("family", ["roberta", "vit"])
def test_less_is_computed_and_kept_and_the_gradient_is_biased(family):
    case = make(family)

    def run(*operations):
        return reduced_gradient(
            case.model, case.partition, 0, case.batch, operations
        ).gradients

    def flops(*operations):
        with FlopCounterMode(display=False) as counter:
            run(*operations)
        return counter.get_total_flops()

    def kept(*operations):
        return saved_bytes(case.model, lambda: run(*operations))

    whole = (FULL, FULL, FULL)
    forward_only = (FULL, FORWARD, FORWARD)
    skipped = (FULL, SKIP, SKIP)
    assert flops(*skipped) < flops(*forward_only) < flops(*whole)
    assert kept(*skipped) <= kept(*forward_only) < 0.75 * kept(*whole)
    names = case.partition.blocks[0]
    exact, reduced = (
        torch.cat([gradients[name].flatten() for name in names])
        for gradients in (run(*whole), run(*forward_only))
    )
    cosine = torch.nn.functional.cosine_similarity(exact, reduced, dim=0)
    assert 0.1 < cosine < 0.9999


@pytest.mark.parametrize("operations", rest_slow(["fof", "fso", "ffs", "fss"]))
def test_costs_fall_by_what_is_left_out(operations):
    case = make("roberta")
    partition = partition_parameters(n for n, _ in case.model.named_parameters())
    costs = model_costs(case.model, partition, batch_size=6, sequence_length=10)
    flops, memory_bytes = reduced_costs(costs, 0, from_text(operations))
    one = costs.flops[0] - costs.flops[1]
    units = sum("sof".index(letter) for letter in operations) + 1
    full_units = 3 + 2 + 2
    assert flops == pytest.approx(costs.flops[0] - (full_units - units) * one)
    dropped = sum(letter != "f" for letter in operations[1:])
    step = costs.memory_bytes[0] - costs.memory_bytes[1]
    assert memory_bytes == pytest.approx(costs.memory_bytes[0] - dropped * step)


def test_letters():
    assert from_text(to_text((SKIP, FORWARD, FULL))) == (SKIP, FORWARD, FULL)
    with pytest.raises(UserError, match=r"must consist of the letters"):
        from_text("fx")
    assert np.array(from_text("sof")).tolist() == [0, 1, 2]
