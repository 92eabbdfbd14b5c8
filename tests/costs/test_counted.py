"""What a step costs, counted as PyTorch executes it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from packaging.version import Version
from torch import nn

from lola_flwr.costs.counted import counted
from lola_flwr.costs.counter import at_batch
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.costs.examples import training_example
from lola_flwr.costs.memory import Levers
from lola_flwr.costs.of_model import model_costs, with_pool, zeroth_order_costs
from lola_flwr.costs.shapes import KNOWN_MODELS, model_shapes
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.blocks import BlockPartition, partition_parameters
from simulations.benchmarks.cost_cases import CASES
from simulations.benchmarks.counted_costs import compare
from tests.conftest import SMALL
from tests.costs.counting import REFUSED, partition_of
from tests.marks import rest_slow
from tests.model.block_cases import CASES as MODELS
from tests.model.block_cases import built

# The others are like it; all of them are in the table of the documentation.
FAST = ("Llama LM, LoRA on nf4", "Llama LM, LoRA on half of it")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_what_is_counted_is_what_pytorch_executes(name):
    if "nf4" in name or "int8" in name:
        pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in REFUSED:
            with pytest.raises(UserError, match=REFUSED[name]):
                compare(CASES[name])
            return
        rows = compare(CASES[name])
    assert rows
    for row in rows:
        assert row.flops_ratio == pytest.approx(1, abs=0.01)
        assert row.step_ratio == pytest.approx(1, abs=0.05)
        assert row.memory_ratio == pytest.approx(1, abs=0.05)


def mlp():
    """Three layers of 4 to 4 without bias, and a head of 4 to 2."""
    return nn.Sequential(
        *(nn.Linear(4, 4, bias=False) for _ in range(3)), nn.Linear(4, 2, bias=False)
    )


def test_products_by_hand():
    model = mlp()
    partition = partition_of(model, blocks=["0", "1", "2"])
    costs = model_costs(model, partition, batch_size=6)
    layer, head = 6 * 2 * 16, 6 * 2 * 8
    # All forward; back through the head, for its gradient and its input's; through the
    # layers nearer the loss; and the block's own gradient.
    np.testing.assert_array_equal(
        costs.flops,
        [3 * layer + 3 * head + above * layer + layer for above in (2, 1, 0)],
    )
    np.testing.assert_array_equal(costs.gradient_bytes, [4 * 24] * 3)
    # A layer of no other effect than its product keeps what it reads if it is trained.
    # When the head is passed there are, of 6 x 4 numbers each: the input, what the
    # block reads (the first reads the input), what the head reads, and the gradient of
    # that; and besides the loss, as it is and weighed, its gradient, and the head's.
    numbers = 4 * 6 * 4
    step = np.array([3, 4, 4]) * numbers + 4 * (3 + 8)
    np.testing.assert_array_equal(costs.step.whole_bytes, step)
    np.testing.assert_array_equal(costs.memory_bytes, 4 * (3 * 16 + 8) + step)


def layers_alike():
    config = hf.RobertaConfig(**{**SMALL, "num_hidden_layers": 6})
    return hf.RobertaForSequenceClassification(config), {}


def layers_in_turn():
    decoder = {**SMALL, "num_hidden_layers": 6, "num_key_value_heads": 1}
    config = hf.Gemma2Config(**decoder, head_dim=8, sliding_window=4, pad_token_id=0)
    return hf.Gemma2ForCausalLM(config), {}


def layers_of_stages():
    return MODELS["swin by layers"].make(), MODELS["swin by layers"].by_hand


LAYERS = rest_slow([layers_alike, layers_in_turn, layers_of_stages])


@pytest.mark.slow
@pytest.mark.parametrize("make", LAYERS)
def test_all_blocks_are_as_if_each_was_counted(make):
    model, by_hand = make()
    partition = partition_of(model, **by_hand)

    def count(runnable):
        blocks = range(partition.num_blocks)
        runs = [runnable.run(partition, [index]) for index in blocks]
        return runnable.count(partition, 6), runs

    every, runs = counted(model, training_example(model, 10), count)
    for index, run in enumerate(runs):
        np.testing.assert_array_equal(every.flops[index], run.flops)
        assert every.whole_bytes[index] == run.peak_bytes(6)
        assert every.one_bytes[index] == run.peak_bytes(1, gradients=False)


@pytest.mark.slow
@pytest.mark.parametrize("make", [layers_alike, layers_in_turn, layers_of_stages])
def test_blocks_together_are_as_if_they_were_counted(make):
    model, by_hand = make()
    partition = partition_of(model, **by_hand)
    costs = model_costs(model, partition, batch_size=6, sequence_length=10)
    last = partition.num_blocks - 1
    spans = [(0, 1), tuple(range(1, last)), tuple(range(last + 1))]
    runs = counted(
        model,
        training_example(model, 10),
        lambda m: [m.run(partition, span) for span in (spans[0], *spans)][1:],
    )
    for span, run in zip(spans, runs, strict=True):
        joined, first = costs.joined([span]), span[0]
        assert joined.flops[first] == pytest.approx(at_batch(run.flops, 6), rel=1e-12)
        expected = run.peak_bytes(6)
        assert joined.step.whole_bytes[first] == pytest.approx(expected, rel=0.15)
        # Other blocks cost what they did.
        others = np.arange(last + 1) != first
        np.testing.assert_array_equal(joined.flops[others], costs.flops[others])
        memory_bytes = joined.memory_bytes[others]
        np.testing.assert_array_equal(memory_bytes, costs.memory_bytes[others])


@pytest.mark.slow
def test_sizes_between_take_no_more_than_is_planned(roberta):
    partition = partition_of(roberta)
    options = {"sequence_length": 10}
    step = model_costs(roberta, partition, batch_size=8, **options).step
    for size in (1, 5, 8):
        alone = model_costs(roberta, partition, batch_size=size, **options).step
        planned, found = step.pass_bytes.of(size), alone.pass_bytes.of(size)
        assert (planned >= found * (1 - 1e-12)).all()
        if size in (1, 8):
            np.testing.assert_allclose(planned, found)


def test_micro_batches(roberta):
    partition = partition_of(roberta)
    sizes = {"batch_size": 8, "sequence_length": 10}
    whole = model_costs(roberta, partition, **sizes)
    halves = model_costs(roberta, partition, **sizes, micro_batch_size=4)
    np.testing.assert_allclose(halves.flops, whole.flops)
    assert (halves.memory_bytes < whole.memory_bytes).all()
    np.testing.assert_array_equal(
        halves.memory_bytes, halves.step.peak_bytes(Levers(4))
    )


def test_the_whole_stack(roberta):
    partition = partition_of(roberta)
    sizes = {"batch_size": 8, "sequence_length": 10}
    blocks = model_costs(roberta, partition, **sizes)
    whole = model_costs(roberta, partition, **sizes, merged=True)
    assert whole.flops.shape == (1,)
    assert whole.flops[0] > blocks.flops.max()
    parameters = dict(roberta.named_parameters())
    trained = sum(parameters[name].nbytes for name in partition.trainable)
    np.testing.assert_array_equal(whole.gradient_bytes, [trained])


@pytest.mark.slow
def test_the_model_stays_as_it_is():
    # DeBERTa's classifier looks which labels there are, and so runs in earnest.
    for name in ("roberta", "deberta-v2"):
        model, _ = built(MODELS[name])
        model.train()
        parameters = dict(model.named_parameters())
        first = next(iter(parameters.values()))
        first.requires_grad_(False)
        last = parameters[list(parameters)[-1]]
        last.grad = torch.ones_like(last)
        before = {name: v.clone() for name, v in model.state_dict().items()}
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        costs = model_costs(model, partition_of(model), batch_size=4, sequence_length=7)
        assert (np.diff(costs.flops) < 0).all()
        assert torch.equal(states[0], torch.get_rng_state())
        assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
        assert all(module.training for module in model.modules())
        wanting = [p for p in parameters.values() if p.requires_grad]
        assert len(wanting) == len(parameters) - 1
        assert [p for p in parameters.values() if p.grad is not None] == [last]
        for name, values in model.state_dict().items():
            assert torch.equal(values, before[name])


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"),
    reason="this PyTorch does not know a fake number's value: weights are asked for",
)
@pytest.mark.slow
def test_no_layer_is_dropped():
    """Where LayerDrop draws by chance, what is counted is that it drops none."""
    options = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
    options |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 60}

    def flops(layerdrop):
        config = hf.BartConfig(**options, decoder_layerdrop=layerdrop)
        with torch.device("meta"):
            model = hf.BartForConditionalGeneration(config)
        partition = partition_of(model, stack="model.decoder.layers")
        return model_costs(model, partition, batch_size=2, sequence_length=8).flops

    np.testing.assert_array_equal(flops(0.9), flops(0.0))


@pytest.mark.parametrize(
    "name",
    ["minilm-l6", *(pytest.param(n, marks=pytest.mark.slow) for n in KNOWN_MODELS)],
)
def test_the_formulas_are_held_against_what_is_counted(name):
    config = dict(KNOWN_MODELS[name])
    config = hf.AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        model = hf.AutoModelForSequenceClassification.from_config(config)
    known = model_shapes(name)
    partition = partition_parameters(known.shapes)
    sizes = {"batch_size": 16, "sequence_length": 64}
    counted = model_costs(model, partition, **sizes)
    estimated = estimate_costs(
        known.shapes, partition, **sizes, dropout_heads=known.dropout_heads
    )
    np.testing.assert_allclose(estimated.flops, counted.flops, rtol=0.05)
    np.testing.assert_allclose(estimated.memory_bytes, counted.memory_bytes, rtol=0.05)
    one = Levers(1)
    np.testing.assert_allclose(
        estimated.step.peak_bytes(one), counted.step.peak_bytes(one), rtol=0.05
    )
    np.testing.assert_array_equal(estimated.payload_bits, counted.payload_bits)


def test_forward_passes_alone(roberta):
    partition = partition_of(roberta)
    sizes = {"batch_size": 6, "sequence_length": 10}
    costs = model_costs(roberta, partition, **sizes)
    pairs = zeroth_order_costs(roberta, partition, **sizes, num_directions=3)
    # The last block takes a forward pass, and back through head and block some more.
    forward = pairs.flops[0] / 6
    assert forward < costs.flops[-1] < 2 * forward
    assert pairs.memory_bytes.max() < costs.memory_bytes[0]
    pool = with_pool(costs, roberta, partition, **sizes, pool_factor=4)
    np.testing.assert_allclose(pool.flops - costs.flops, 4 * forward)


class TestWeights:
    def test_types_are_the_models_own(self):
        config = hf.LlamaConfig(**SMALL, num_key_value_heads=1, pad_token_id=0)
        options = {"batch_size": 1, "sequence_length": 2}

        def held(model):
            step = model_costs(model, model_partition(model), **options).step
            return step.layer_bytes.sum() + step.rest_bytes + step.head_bytes

        full = hf.LlamaForCausalLM(config)
        buffers = sum(buffer.nbytes for buffer in full.buffers())
        weights = sum(p.nbytes for p in full.parameters())
        assert held(full) == weights + buffers
        half = adapt(hf.LlamaForCausalLM(config).bfloat16(), "lora", {"r": 2})
        added = sum(p.nbytes for n, p in half.named_parameters() if "lora" in n)
        assert added == sum(
            4 * p.numel() for n, p in half.named_parameters() if "lora" in n
        )
        buffers = sum(buffer.nbytes for buffer in half.buffers())
        assert held(half) == weights / 2 + added + buffers

    def test_tied_weights_are_held_once(self):
        config = hf.GPT2Config(n_embd=16, n_head=2, n_layer=3, vocab_size=60)
        model = hf.GPT2LMHeadModel(config)
        step = model_costs(
            model, model_partition(model), batch_size=1, sequence_length=4
        ).step
        held = step.layer_bytes.sum() + step.rest_bytes + step.head_bytes
        assert held == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    def test_blocks_in_reverse_are_counted_one_by_one(self):
        """The names say nothing of the order in which modules run."""
        model = mlp()
        names = tuple(name for name, _ in model.named_parameters())
        forward = partition_of(model, blocks=["0", "1", "2"])
        backward = BlockPartition(
            blocks=forward.blocks[::-1], head=forward.head, frozen=forward.frozen
        )
        assert names
        there = model_costs(model, forward, batch_size=6)
        back = model_costs(model, replace(backward), batch_size=6)
        np.testing.assert_array_equal(back.flops, there.flops[::-1])
