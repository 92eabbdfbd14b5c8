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
from tests.conftest import SMALL
from tests.model.adapted import LORA, TUNERS, adapted_roberta, built, small_roberta
from tests.server.coordinators import npy

# peft warns of much that is meant here.
pytestmark = pytest.mark.filterwarnings("ignore")
BASE_CHANGING = {"pissa", "pissa-fast-svd", "pissa-dora-rs", "olora"}


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


def test_a_saved_merged_model_can_be_tuned_further(tmp_path):
    model, tokenizer = load_classifier("random:roberta-tiny", num_labels=2)
    merge(adapt(model, "lora", {"r": 2})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_classifier(str(tmp_path), num_labels=2)
    assert model_partition(adapt(loaded, "lora", {"r": 2})).num_blocks == 4
