"""Adapters of peft as blocks, over tiny models with random weights."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lola_flwr.build import coordinator_for
from lola_flwr.clients import BlockDevice
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.machine import installation
from lola_flwr.model.adapter_blocks import base_name, model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import BlocksNotFound
from lola_flwr.model.loading import fingerprint, load_classifier
from lola_flwr.model.saved_adapters import merge, save_model
from lola_flwr.server.replies import DeviceReply
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.npy import NPY_HEADER_BYTES
from lola_flwr.wire.payload import payload_bits
from tests.conftest import SMALL
from tests.marks import rest_slow
from tests.server.coordinators import npy

# peft warns of much that is meant here.
pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
TUNERS = {
    "lora": ("lora", LORA),
    "lora-all-linear": ("lora", {"target_modules": "all-linear", "lora_bias": True}),
    "dora": ("lora", {**LORA, "use_dora": True}),
    "pissa": ("lora", {**LORA, "init_lora_weights": "pissa"}),
    "pissa-fast-svd": ("lora", {**LORA, "init_lora_weights": "pissa_niter_4"}),
    "pissa-dora-rs": (
        "lora",
        {
            **LORA,
            "init_lora_weights": "pissa",
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"value": 3},
            "alpha_pattern": {"query": 2},
        },
    ),
    "olora": ("lora", {**LORA, "init_lora_weights": "olora"}),
    "randlora": ("randlora", {"r": 4}),
    "vera": ("vera", {"r": 8}),
    "ia3": ("ia3", {}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("lokr", {}),
    "oft": ("oft", {"oft_block_size": 8, "r": 0}),
    "boft": ("boft", {"boft_block_size": 4}),
    "fourierft": ("fourierft", {"n_frequency": 20}),
    "ln-tuning": ("ln_tuning", {}),
}
BASE_CHANGING = {"pissa", "pissa-fast-svd", "pissa-dora-rs", "olora"}


def small_roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=40)
    return transformers.RobertaForSequenceClassification(config).eval()


def adapted_roberta(case, seed=3):
    tuning, options = TUNERS[case]
    model = adapt(small_roberta(), tuning, options, seed=seed)
    return model, model_partition(model)


def perturb(model, partition):
    """Move the trained values to where every one of them matters."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name in partition.trainable:
            values = model.get_parameter(name)
            values.add_(0.1 * torch.randn_like(values))


@pytest.mark.parametrize("case", TUNERS)
class TestTuners:
    def test_blocks_are_the_layers_adapters_as_the_seed_gives_them(self, case):
        model, partition = adapted_roberta(case)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(partition.trainable) == trained
        for index, (block, layer) in enumerate(
            zip(partition.blocks, partition.layers, strict=True)
        ):
            where = f"base_model.model.roberta.encoder.layer.{index}."
            assert block
            assert all(name.startswith(where) for name in (*block, *layer))
            assert set(layer) < set(partition.frozen)
            # The 16 weights and biases of a RoBERTa layer, none of them the adapter's.
            assert len(layer) == 16
        assert [model.get_parameter(name).shape for name in partition.head] == [
            values.shape for values in small_roberta().classifier.parameters()
        ]
        parameters = [name for name, _ in model.named_parameters()]
        assert set(parameters) <= {*partition.trainable, *partition.frozen}

        again, same = adapted_roberta(case)
        assert partition == same
        for names in (partition.frozen, partition.trainable):
            assert fingerprint(model, names) == fingerprint(again, names)
        plain = small_roberta()
        changed = [
            name
            for layer in partition.layers
            for name in layer
            if not torch.equal(
                model.get_parameter(name),
                plain.get_parameter(base_name(name)),
            )
        ]
        assert bool(changed) == (case in BASE_CHANGING)

    def test_gradient_is_that_part_of_full_backpropagation(self, case, batch):
        model, partition = adapted_roberta(case)
        frozen = fingerprint(model, partition.frozen)
        perturb(model, partition)
        model.train()
        parameters = [model.get_parameter(name) for name in partition.trainable]
        torch.manual_seed(7)
        full = torch.autograd.grad(model(**batch).loss, parameters)
        expected = dict(zip(partition.trainable, full, strict=True))
        for index in range(partition.num_blocks):
            torch.manual_seed(7)
            result = block_gradient(model, partition, index, batch)
            assert tuple(result.gradients) == partition.update_names(index)
            for name, gradient in result.gradients.items():
                torch.testing.assert_close(
                    gradient, expected[name], rtol=1e-5, atol=1e-7
                )
                assert gradient.abs().sum() > 0, name
        assert fingerprint(model, partition.frozen) == frozen

    def test_saved_and_merged_models_give_the_same_outputs(self, case, batch, tmp_path):
        model, partition = adapted_roberta(case)
        perturb(model, partition)
        trained = model(**batch).logits
        assert (trained - small_roberta()(**batch).logits).abs().max() > 1e-3
        save_model(model, tmp_path / "adapter")
        torch.testing.assert_close(model(**batch).logits, trained, rtol=0, atol=0)
        files = {path.name for path in (tmp_path / "adapter").iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        torch.manual_seed(99)
        loaded = peft.PeftModel.from_pretrained(small_roberta(), tmp_path / "adapter")
        torch.testing.assert_close(loaded.eval()(**batch).logits, trained)

        merge(model).save_pretrained(tmp_path / "merged")
        plain = transformers.RobertaForSequenceClassification.from_pretrained(
            tmp_path / "merged"
        )
        assert not hasattr(plain, "peft_config")
        torch.testing.assert_close(
            plain.eval()(**batch).logits, trained, rtol=1e-4, atol=1e-5
        )


def test_a_parameter_that_all_layers_register_belongs_to_the_one_that_reads_it():
    model = adapt(small_roberta(), "tinylora")
    partition = model_partition(model)
    values = torch.randn(1, 16)

    def outputs():
        with torch.no_grad():
            return [
                torch.cat(
                    [
                        layer.attention.self.query(values),
                        layer.attention.self.value(values),
                    ]
                )
                for layer in model.base_model.model.roberta.encoder.layer
            ]

    assert [len(block) for block in partition.blocks] == [2] * 3
    for index, block in enumerate(partition.blocks):
        for name in block:
            before = outputs()
            with torch.no_grad():
                model.get_parameter(name).add_(1)
            moved = [
                not torch.equal(*pair) for pair in zip(before, outputs(), strict=True)
            ]
            assert moved == [layer == index for layer in range(3)]


def built(model_class, config):
    torch.manual_seed(0)
    return model_class(config).eval()


LAYERS = {"num_attention_heads": 2, "num_hidden_layers": 3}
FAMILIES = {
    "vit": lambda: built(
        transformers.ViTForImageClassification,
        transformers.ViTConfig(
            hidden_size=16, intermediate_size=32, image_size=8, patch_size=4, **LAYERS
        ),
    ),
    "gpt2": lambda: built(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=60),
    ),
    "llama": lambda: built(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_key_value_heads=1,
            vocab_size=60,
            **LAYERS,
        ),
    ),
    "llama-classifier": lambda: built(
        transformers.LlamaForSequenceClassification,
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, vocab_size=60, **LAYERS
        ),
    ),
    "distilbert": lambda: built(
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(dim=16, hidden_dim=32, n_heads=2, n_layers=3),
    ),
    "t5": lambda: built(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=3),
    ),
}


class TestFamilies:
    # Parameters in a block under peft's own targets, or all linear maps where it has
    # none for the family; and what the head is.
    @pytest.mark.parametrize(
        ("family", "in_block", "head"),
        [
            ("vit", 12, ["classifier"]),
            ("gpt2", 2, []),
            ("llama", 4, []),
            ("llama-classifier", 4, ["score"]),
            ("distilbert", 12, ["pre_classifier", "classifier"]),
        ],
    )
    def test_targets_and_head_by_default(self, family, in_block, head):
        partition = model_partition(adapt(FAMILIES[family](), "lora"))
        assert [len(block) for block in partition.blocks] == [in_block] * 3
        modules = dict.fromkeys(name.split(".")[2] for name in partition.head)
        assert list(modules) == head

    def test_both_stacks_of_t5(self):
        model = adapt(FAMILIES["t5"](), "lora")
        partition = model_partition(model, blocks=r"(encoder|decoder)\.block\.\d+")
        assert [len(block) for block in partition.blocks] == [4, 4, 4, 8, 8, 8]

    def test_one_stack_of_t5(self):
        model = adapt(
            FAMILIES["t5"](), "lora", {"target_modules": r"encoder\..*\.(q|v)"}
        )
        partition = model_partition(model, stack="encoder.block")
        assert [len(block) for block in partition.blocks] == [4, 4, 4]
        everywhere = adapt(FAMILIES["t5"](), "lora")
        with pytest.raises(BlocksNotFound, match=r"decoder\.block\.0.*neither in a"):
            model_partition(everywhere, stack="encoder.block")

    def test_modules_to_save_of_ones_own(self):
        options = {**LORA, "modules_to_save": ["out_proj"]}
        partition = model_partition(adapt(small_roberta(), "lora", options))
        assert {name.split(".")[3] for name in partition.head} == {"out_proj"}

    def test_a_head_beside_a_part_of_a_base(self):
        shape = {**LAYERS, "hidden_size": 16, "intermediate_size": 32}
        config = transformers.CLIPConfig(
            vision_config={**shape, "image_size": 8, "patch_size": 4},
            text_config={**shape, "vocab_size": 60},
        )
        model = adapt(built(transformers.CLIPForImageClassification, config), "lora")
        head = {name.split(".")[2] for name in model_partition(model).head}
        assert head == {"classifier"}
        bare = adapt(
            built(transformers.BertModel, transformers.BertConfig(**SMALL)), "lora"
        )
        assert model_partition(bare).head == ()

    def test_without_adapters(self):
        model = small_roberta()
        assert adapt(model, "full") is model
        partition = model_partition(model)
        assert partition.layers == ()
        assert [len(block) for block in partition.blocks] == [16] * 3

    def test_merged_blocks(self):
        _, partition = adapted_roberta("lora")
        merged = partition.merged()
        assert merged.blocks == (tuple(n for b in partition.blocks for n in b),)
        assert merged.layers == (tuple(n for b in partition.layers for n in b),)


class TestTargetsThatPeftDoesNotKnow:
    """peft has none for the model, or names that transformers has changed since."""

    @pytest.mark.parametrize("tuning", ["adamss", "frod", "ia3", "lora"])
    def test_linear_maps_of_the_layers(self, tuning, caplog):
        caplog.set_level("INFO")
        model = adapt(FAMILIES["vit"](), tuning)
        partition = model_partition(model)
        linear = {
            name.removeprefix("base_model.model.").removesuffix(".base_layer")
            for name, _ in model.named_modules()
            if name.endswith(".base_layer")
        }
        expected = {
            name
            for name, module in FAMILIES["vit"]().named_modules()
            if isinstance(module, nn.Linear) and name != "classifier"
        }
        assert linear == expected
        assert len(expected) == 3 * 6
        assert all(partition.blocks)
        assert "knows no targets for this model" in caplog.text

    def test_what_stands_before_the_layers_is_left_alone(self):
        config = transformers.ElectraConfig(**SMALL, embedding_size=8)
        model = built(transformers.ElectraForSequenceClassification, config)
        partition = model_partition(adapt(model, "beft"))
        assert [len(block) for block in partition.blocks] == [6] * 3
        assert {name.split(".")[2] for name in partition.head} == {"classifier"}

    @pytest.mark.parametrize(
        ("family", "in_layer"),
        [
            (small_roberta, 2),
            (lambda: FAMILIES["vit"](), 2),
            (lambda: FAMILIES["distilbert"](), 2),
            (lambda: FAMILIES["llama-classifier"](), 2),  # known to peft
        ],
    )
    def test_normalisations_for_ln_tuning(self, family, in_layer):
        model = adapt(family(), "lntuning")
        partition = model_partition(model)
        for block in partition.blocks:
            hosts = {name.partition(".ln_tuning_layers")[0] for name in block}
            assert len(hosts) == in_layer
            for host in hosts:
                kind = type(model.get_submodule(host).base_layer).__name__
                assert kind.endswith("Norm")

    def test_options_of_the_user_come_first(self):
        options = {"target_modules": ["q_proj"], "feedforward_modules": []}
        partition = model_partition(adapt(FAMILIES["vit"](), "ia3", options))
        assert [len(block) for block in partition.blocks] == [1] * 3
        for key in ("target_modules", "target_parameters"):
            with pytest.raises(UserError, match=rf"{key}=\['query'\]: .*target"):
                adapt(FAMILIES["vit"](), "lora", {key: ["query"]})


class TestRefusals:
    @pytest.mark.parametrize(
        ("tuning", "options", "message"),
        [
            ("prompt_tuning", {}, "does not adapt layers one by one"),
            ("prefix-tuning", {}, "does not adapt layers one by one"),
            ("adalora", {"total_step": 9}, "moves ranks between layers"),
            ("randlorra", {}, r"neither 'full' nor a tuner of peft.*randlora"),
            ("full", {"r": 8}, "takes no options; got r"),
            ("lora", {"rank": 8}, "unexpected keyword argument 'rank'"),
            ("lora", {"target_modules": ["q"]}, "No modules were targeted"),
            ("lora", {"init_lora_weights": "eva"}, "looks at training data"),
            ("lora", {"init_lora_weights": "nice"}, "nice"),
            ("lora", {"inference_mode": True}, "freezes the adapters.*leave it out"),
            ("lora", {"init_lora_weights": "loftq"}, "makes up for what"),
            ("lora", {"layer_replication": [[0, 2], [1, 3]]}, "share their weights"),
            ("lora", {"arrow_config": {}}, r"with arrow_config=\{\}: AttributeError"),
            ("lora", {**LORA, "r": "8"}, "with r='8'"),
            ("shadow", {}, "trains a network beside the layers"),
            ("trainable_tokens", {}, "trains embeddings"),
            ("lora", {"modules_to_save": ["classifier", "out_proj"]}, "what is in it"),
            (
                "lora",
                {"modules_to_save": ["out_proj"], "task_type": "SEQ_CLS"},
                "modules_to_save names classifier and what is in it",
            ),
        ],
    )
    def test_options(self, tuning, options, message):
        with pytest.raises(UserError, match=message) as raised:
            adapt(small_roberta(), tuning, options)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        ("tuning", "options", "message"),
        [
            ("vblora", {"vector_length": 4, "num_vectors": 8}, "one parameter of sev"),
            ("tinylora", {"weight_tying": 1.0}, "one parameter of several layers"),
            ("lily", {}, "one parameter of several layers"),
            ("lora", {**LORA, "bias": "all"}, "neither in a block nor behind.*bias"),
            ("lora", {**LORA, "layers_to_transform": [1]}, "No adapter in block 0"),
        ],
    )
    def test_what_cannot_be_divided(self, tuning, options, message):
        model = adapt(small_roberta(), tuning, options)
        with pytest.raises(BlocksNotFound, match=message) as raised:
            model_partition(model)
        assert "\n" not in str(raised.value)

    def test_without_peft(self, monkeypatch):
        monkeypatch.setattr(installation, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"'lora' needs peft: pip .*\[adapters\]"):
            adapt(small_roberta(), "lora")

    @pytest.mark.slow
    def test_peft_is_imported_for_adapters_only(self):
        program = (
            "import sys, torch\n"
            "import lola_flwr.model.adapters, lola_flwr.build\n"
            "lola_flwr.model.adapters.adapt(torch.nn.Linear(1, 1), 'full')\n"
            "sys.exit('peft' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", program], check=True)

    def test_new_modules_whose_name_ends_others(self):
        model = small_roberta()
        model.dense = nn.Linear(16, 16)
        with pytest.raises(UserError, match=r"train roberta\..*\.dense in full, whose"):
            adapt(model, "lora", LORA)


def test_the_callers_random_numbers_are_left_alone():
    model = small_roberta()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model = adapt(model, "lora", LORA, seed=8)
    model_costs(model, model_partition(model), batch_size=1, sequence_length=4)
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_threads_do_not_change_the_initialised_base(initialisation):
    config = transformers.RobertaConfig(
        **{**SMALL, "hidden_size": 256, "intermediate_size": 256}
    )
    digests = set()
    threads = torch.get_num_threads()
    for count in (1, 2):
        model = built(transformers.RobertaForSequenceClassification, config)
        torch.set_num_threads(count)
        try:
            options = {"init_lora_weights": initialisation}
            model = adapt(model, "lora", options)
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        digests.add(fingerprint(model, model_partition(model).frozen))
    assert len(digests) == 1


class WithStatistics(nn.Module):
    """A stack whose layers and head keep running statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)
        )
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, values):
        for layer in self.layers:
            values = values + layer(values)
        return self.head(values)


def test_statistics_are_not_compared():
    model = adapt(
        WithStatistics(),
        "vera",
        {"r": 2, "target_modules": r"layers\.\d\.0", "modules_to_save": ["head"]},
    )
    partition = model_partition(model, stack="layers")
    buffers = [name for name, _ in model.named_buffers() if name in partition.frozen]
    assert {name.split(".")[-2] for name in buffers} == {"vera_A", "vera_B"}
    before = fingerprint(model, partition.frozen)
    model.train()(torch.randn(8, 4))
    assert fingerprint(model, partition.frozen) == before


def test_a_round_steps_the_adapters(batch):
    model, partition = adapted_roberta("pissa")
    costs = model_costs(model, partition, batch_size=6, sequence_length=10)
    coordinator = coordinator_for(model, partition, costs=costs, batch_size=6)
    initial = {name: values.copy() for name, values in coordinator.values().items()}
    devices = {}
    for index in range(3):
        profile = simulated_device(index, seed=0)
        coordinator.add_device(str(index), profile.to_properties())
        devices[str(index)] = BlockDevice(
            profile=profile,
            load_model=lambda: adapted_roberta("pissa"),
            batch_source=lambda server_round, batch_size: batch,
        )
    plan = coordinator.plan_round(1, devices)
    replies = []
    for device_id, assignment in plan.assignments.items():
        update = devices[device_id].train(assignment, coordinator.values())
        replies.append((device_id, update))
    record = coordinator.complete_round(
        plan,
        [
            DeviceReply(
                device_id=device_id,
                tensors=[npy(array) for array in update.arrays.values()],
                num_examples=update.num_examples,
                report=update.report.to_record(),
            )
            for device_id, update in replies
        ],
    )
    assert [block.status for block in record.blocks] == ["accepted"] * 3
    for name, values in coordinator.values().items():
        assert not np.array_equal(values, initial[name]), name

    unlike = replace(
        devices["0"], load_model=lambda: adapted_roberta("lora")
    )  # the same names, another base
    assignment = next(iter(plan.assignments.values()))
    with pytest.raises(UserError, match="differ from the server's"):
        unlike.train(assignment, coordinator.values())


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
        [
            ("boft", {"boft_block_size": 4}),  # [1, 4, 4, 4]
            ("lora", {**LORA, "init_lora_weights": "orthogonal", "bias": "lora_only"}),
        ],
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


def test_a_saved_merged_model_can_be_tuned_further(tmp_path):
    model, tokenizer = load_classifier("random:roberta-tiny", num_labels=2)
    merge(adapt(model, "lora", {"r": 2})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_classifier(str(tmp_path), num_labels=2)
    assert model_partition(adapt(loaded, "lora", {"r": 2})).num_blocks == 4
