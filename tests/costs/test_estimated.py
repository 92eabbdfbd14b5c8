from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import partition_parameters


def costs_of(model, **options):
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    partition = partition_parameters(shapes)
    return estimate_costs(shapes, partition, **options), partition


def test_hand_computed_layer():
    # One matrix pair per layer: h=4, i=16, S=2 tokens, B=3 sequences.
    shapes = {
        "embed.w": (10, 4),
        **{
            f"l.{n}.{name}": shape
            for n in range(2)
            for name, shape in {"up": (16, 4), "down": (4, 16), "norm": (4,)}.items()
        },
        "head.w": (2, 4),
    }
    costs = estimate_costs(
        shapes, partition_parameters(shapes), batch_size=3, sequence_length=2
    )
    forward = 2 * (2 * 64 + 2 * 2 * 4)  # per token: two matrices and the attention
    head = 3 * 3 * 2 * 8
    np.testing.assert_allclose(
        costs.flops, [6 * forward * (2 + 1 + 2) + head, 6 * forward * (2 + 2) + head]
    )
    uploaded = 64 + 64 + 4 + 8
    np.testing.assert_allclose(costs.gradient_bytes, [4 * uploaded] * 2)
    weights = 40 + 2 * 132 + 8
    # The head keeps the last hidden states; one more is on its way back.
    passed, trained = 6 * 4 + 16, 2 * 4 + 16 + 4 + 4
    np.testing.assert_allclose(
        costs.memory_bytes,
        [
            4 * (weights + uploaded + 6 * (2 * passed + trained)),
            4 * (weights + uploaded + 6 * (passed + trained)),
        ],
    )


@pytest.mark.parametrize("block_index", [0, 1, 2])
def test_operations_agree_with_pytorchs_counter(roberta, batch, block_index):
    # The counter knows plain matrix products, but not the CPU's fused attention.
    roberta.set_attn_implementation("eager")
    costs, partition = costs_of(roberta, batch_size=6, sequence_length=10)
    with FlopCounterMode(display=False) as counter:
        block_gradient(roberta, partition, block_index, batch)
    counted = counter.get_total_flops()
    assert costs.flops[block_index] == pytest.approx(counted, rel=0.08)


def test_merged_blocks_cost_what_full_fine_tuning_does(roberta, batch):
    roberta.set_attn_implementation("eager")
    costs, partition = costs_of(roberta, batch_size=6, sequence_length=10, merged=True)
    with FlopCounterMode(display=False) as counter:
        block_gradient(roberta, partition.merged(), 0, batch)
    assert costs.flops == pytest.approx([counter.get_total_flops()], rel=0.08)
    parameters = dict(roberta.named_parameters())
    trained = sum(parameters[name].numel() for name in partition.trainable)
    np.testing.assert_array_equal(costs.gradient_bytes, [4 * trained])
    single, _ = costs_of(roberta, batch_size=6, sequence_length=10)
    assert costs.memory_bytes[0] > single.memory_bytes.max()


def test_deeper_blocks_cost_more(roberta):
    costs, _ = costs_of(roberta, batch_size=8, sequence_length=16)
    assert np.all(np.diff(costs.flops) < 0)
    assert np.all(np.diff(costs.memory_bytes) < 0)


def sized(model, **options):
    return costs_of(model, batch_size=6, sequence_length=10, **options)[0]


def test_all_blocks_together_cost_what_merged_ones_do(roberta):
    costs, merged = sized(roberta), sized(roberta, merged=True)
    joined = costs.joined([(0, 1, 2)])
    for name in ("flops", "memory_bytes", "payload_bits", "gradient_bytes"):
        np.testing.assert_allclose(getattr(joined, name)[0], getattr(merged, name)[0])
        np.testing.assert_array_equal(
            getattr(joined, name)[1:], getattr(costs, name)[1:]
        )


def test_some_blocks_together_cost_what_lies_between(roberta):
    costs = sized(roberta)
    together = costs.joined([(0, 1)])
    both = costs.joined([(0, 1), (2,)])
    every = costs.joined([(0, 1, 2)])
    apart = costs.joined([(0, 2)])
    for name in ("flops", "memory_bytes", "payload_bits", "gradient_bytes"):
        alone, two, odd, three = (
            getattr(c, name)[0] for c in (costs, together, apart, every)
        )
        assert alone < two < three
        assert odd == pytest.approx(two)
        # Each block more adds as much, these being alike.
        assert two - alone == pytest.approx(three - two)
        assert getattr(both, name)[0] == two
    assert costs.joined([(0,), (2,)]) is costs


def test_layers_that_run_twice_keep_what_goes_into_them(roberta):
    costs = sized(roberta)
    twice = costs.step.recomputation()
    forward = costs.flops[1] - costs.flops[2]  # of a layer, all being alike
    np.testing.assert_allclose(twice.further_flops, forward * np.array([3, 2, 1]))
    # Of 10 tokens, in hidden states (16 numbers): the block's layer keeps what goes
    # into it, 8 to pass it, 4 for its weights; and behind the last layer are 2.
    kept = twice.pass_bytes.per_sequence
    np.testing.assert_allclose(kept, [4 * 10 * 16 * (1 + 8 + 4 + 2)] * 3)
    np.testing.assert_allclose(twice.whole_bytes, costs.gradient_bytes + 6 * kept)
    assert kept[0] < costs.step.pass_bytes.per_sequence[0]
    # With the last layer trained, too, what goes into all three is there beside that.
    joined = costs.joined([(0, 1)]).step.recomputation()
    expected = [4 * 10 * 16 * (3 + 8 + 4 + 2), *kept[1:]]
    np.testing.assert_allclose(joined.pass_bytes.per_sequence, expected)
    np.testing.assert_array_equal(joined.further_flops, twice.further_flops)


def test_costs_without_those_together_are_refused(roberta):
    costs = replace(sized(roberta), together=None)
    assert costs.joined([(1,)]) is costs
    with pytest.raises(UserError, match="make them with model_costs"):
        costs.joined([(0, 1)])
