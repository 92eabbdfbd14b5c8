"""What adapters cost: payload, operations, memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from lola_flwr.costs.of_model import model_costs
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.npy import NPY_HEADER_BYTES
from lola_flwr.wire.payload import payload_bits
from tests.conftest import SMALL
from tests.marks import rest_slow
from tests.model.adapted import (
    FAMILIES,
    LORA,
    TUNERS,
    adapted_roberta,
    built,
    small_roberta,
)

# peft warns of much that is meant here.
pytestmark = pytest.mark.filterwarnings("ignore")


class TestCosts:
    def test_payload_of_lora_on_roberta_base(self):
        config = transformers.RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
        )
        with torch.device("meta"):
            model = transformers.RobertaForSequenceClassification(config)
        model = adapt(model, "lora", {"r": 8, "target_modules": ["query", "value"]})
        partition = model_partition(model)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        uploaded = replace(partition, head=())
        bits = payload_bits(uploaded, shapes, codec_named("bf16"))
        # A and B of two matrices: 4 tensors of 8 x 768 values of 2 bytes, in one array.
        per_block = 4 * 8 * 768 * 2 + NPY_HEADER_BYTES
        assert 12 * per_block < 0.6e6
        # Its name and Flower's records around it: some 1.2 kB a message.
        records = bits / 8 - per_block
        assert np.all((records > 1_000) & (records < 1_300))
        head = sum(model.get_parameter(name).numel() for name in partition.head)
        assert head == 768 * 768 + 768 + 2 * 768 + 2

    @pytest.mark.parametrize(
        "case",
        rest_slow(["lora-all-linear", "lora", "dora", "vera", "oft", "c3a-all-linear"]),
    )
    def test_operations_are_those_of_pytorch(self, case):
        config = transformers.RobertaConfig(
            hidden_size=64,
            intermediate_size=256,
            num_attention_heads=2,
            num_hidden_layers=3,
            vocab_size=60,
            max_position_embeddings=40,
        )
        tuning, options = {
            **TUNERS,
            # Keeps the input of every module, trained or not.
            "c3a-all-linear": (
                "c3a",
                {"target_modules": "all-linear", "block_size": 16},
            ),
        }[case]
        model = built(transformers.RobertaForSequenceClassification, config)
        model = adapt(model, tuning, options).train()
        partition = model_partition(model)
        ids = torch.randint(5, 60, (16, 32))
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.zeros(16, dtype=torch.long),
        }
        costs = model_costs(model, partition, batch_size=16, sequence_length=32)
        for index in range(3):
            with FlopCounterMode(display=False) as counter:
                block_gradient(model, partition, index, batch)
            assert costs.flops[index] == counter.get_total_flops()

    @pytest.mark.slow
    def test_a_frozen_pooler_is_passed(self):
        config = transformers.BertConfig(**SMALL)
        model = adapt(built(transformers.BertForSequenceClassification, config), "lora")
        partition = model_partition(model)
        assert partition.frozen_head == (
            "base_model.model.bert.pooler.dense.weight",
            "base_model.model.bert.pooler.dense.bias",
        )
        options = {"batch_size": 8, "sequence_length": 16}
        passed = model_costs(model, partition, **options)
        trained = model_costs(
            model,
            replace(
                partition,
                head=(*partition.head, *partition.frozen_head),
                frozen_head=(),
            ),
            **options,
        )
        # For its gradient, as many operations as forward: one token of each sequence.
        np.testing.assert_array_equal(trained.flops - passed.flops, 8 * 2 * 16 * 16)

    @pytest.mark.parametrize(
        ("tuning", "options"),
        rest_slow(
            [
                ("boft", {"boft_block_size": 4}),  # [1, 4, 4, 4]
                (
                    "lora",
                    {**LORA, "init_lora_weights": "orthogonal", "bias": "lora_only"},
                ),
            ],
            1,
        ),
    )
    def test_tuners_with_values_of_other_shapes(self, tuning, options):
        model = adapt(small_roberta(), tuning, options)
        partition = model_partition(model)
        costs = model_costs(model, partition, batch_size=8, sequence_length=16)
        assert np.all(np.diff(costs.flops) < 0)

    @pytest.mark.slow
    def test_a_stack_behind_the_blocks_is_passed(self):
        options = {"target_modules": r"encoder\..*\.(q|v)"}
        model = adapt(FAMILIES["t5"](), "lora", options)
        partition = model_partition(model, stack="encoder.block")
        ids = torch.zeros(1, 4, dtype=torch.long)
        example = {"input_ids": ids, "decoder_input_ids": ids}
        costs = model_costs(model, partition, batch_size=1, example=example)
        assert np.all(np.diff(costs.flops) < 0)

    @pytest.mark.slow
    def test_adapters_cost_less_than_their_layers(self):
        model, partition = adapted_roberta("lora")
        plain = small_roberta()
        options = {"batch_size": 8, "sequence_length": 16}
        small = model_costs(model, partition, **options)
        full = model_costs(plain, model_partition(plain), **options)
        assert np.all(small.flops < full.flops)
        assert np.all(small.payload_bits < full.payload_bits)

    @pytest.mark.slow
    def test_fixed_parts_are_paid_for_each_micro_batch(self):
        # LoHa builds its weight anew for every pass, whatever goes through it.
        model, partition = adapted_roberta("loha")
        options = {"batch_size": 8, "sequence_length": 16}
        whole = model_costs(model, partition, **options)
        halves = model_costs(model, partition, **options, micro_batch_size=4)
        assert np.all(halves.flops > whole.flops)
        assert np.all(halves.memory_bytes < whole.memory_bytes)

    def test_whole_stack(self):
        model, partition = adapted_roberta("lora")
        options = {"batch_size": 8, "sequence_length": 16}
        blocks = model_costs(model, partition, **options)
        merged = model_costs(model, partition, **options, merged=True)
        assert merged.flops.shape == (1,)
        assert merged.flops[0] > blocks.flops.max()
        uploaded = sum(model.get_parameter(n).numel() for n in partition.trainable)
        np.testing.assert_array_equal(merged.gradient_bytes, [4 * uploaded])
        shapes = {n: p.shape for n, p in model.named_parameters()}
        expected = payload_bits(partition.merged(), shapes, codec_named("fp32"))
        np.testing.assert_array_equal(merged.payload_bits, expected)
