"""What of a model is adapted, and what is trained in full, by default and by hand."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.blocks import BlocksNotFound
from tests.conftest import SMALL
from tests.model.adapted import (
    FAMILIES,
    LAYERS,
    LORA,
    adapted_roberta,
    built,
    small_roberta,
)

# peft warns of much that is meant here.
pytestmark = pytest.mark.filterwarnings("ignore")


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
