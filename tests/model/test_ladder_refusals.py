"""What a side network is refused for, and directories that are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

from lola_flwr.costs.memory import Levers
from lola_flwr.costs.of_model import model_costs
from lola_flwr.d2ft.find import find_subnetworks
from lola_flwr.device.prefix import (
    ActivationCache,
    LayeredWeights,
    StreamedModel,
    reused_prefix,
    save_base,
)
from lola_flwr.errors import UserError
from lola_flwr.export.describe import ExportedModel
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapter_trial import check_merging
from lola_flwr.model.adapters import adapt
from lola_flwr.model.saved_adapters import merge, save_model
from lola_flwr.model.saved_ladder import load_ladder
from tests.model.ladders import SIZES, examples, plain, with_ladder


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"r": 3}, "no multiple of it.*divide the features of a head, 8"),
            ({"r": 16}, "divide the features of a head, 8"),
            ({"r": 1}, "by a factor of 2 or more"),
            ({"r": True}, "by a factor of 2 or more"),
            ({"rank": 8}, "options r and stack; got 'rank'"),
            ({"r": 4, "stack": "encoder"}, "No stack of layers at stack='encoder'"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(UserError, match=message):
            adapt(plain(), "ladder", options)

    @pytest.mark.parametrize(
        ("kind", "config", "sizes", "message"),
        [
            ("CohereForCausalLM", "CohereConfig", SIZES, "no such pairs"),
            (
                "DebertaV2ForSequenceClassification",
                "DebertaV2Config",
                {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
                "do not run as those of DebertaV2ForSequenceClassification are called",
            ),
            (
                "T5ForConditionalGeneration",
                "T5Config",
                {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64},
                "2 stacks have 6 layers",
            ),
        ],
    )
    def test_models(self, kind, config, sizes, message):
        made = getattr(transformers, config)(**sizes)
        with pytest.raises(UserError, match=message):
            adapt(getattr(transformers, kind)(made).eval(), "ladder", {"r": 4})

    def test_what_is_no_model_of_transformers(self):
        with pytest.raises(UserError, match="models of transformers"):
            adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), "ladder")
        with pytest.raises(UserError, match="have no ladder yet"):
            adapt(with_ladder(), "ladder", {"r": 4})

    def test_other_blocks(self):
        model = with_ladder()
        for named in ({"stack": "roberta.encoder.layer"}, {"blocks": r"roberta\.\d"}):
            with pytest.raises(UserError, match="name the stack that it stands beside"):
                model_partition(model, **named)
        named = "roberta.encoder.layer"
        assert model_partition(with_ladder(stack=named), stack=named).num_blocks == 3

    def test_merging(self):
        model = with_ladder()
        for refused in (merge, lambda given: check_merging(given, examples(given))):
            with pytest.raises(UserError, match="cannot be merged"):
                refused(model)

    def test_layers_below_left_out(self, tmp_path):
        model = with_ladder()
        save_base(model, tmp_path)
        partition = model_partition(model)
        cache = ActivationCache(1 << 20)
        with pytest.raises(UserError, match="none below it to be left out"):
            reused_prefix(model, partition, 2, cache)
        with pytest.raises(UserError, match="none below it to be left out"):
            StreamedModel(model, partition, LayeredWeights(tmp_path, tmp_path))
        # So a device that could stream plans for no less.
        costs = model_costs(model, partition, batch_size=4, sequence_length=7)
        plain_bytes, streamed_bytes = (
            costs.step.peak_bytes(Levers(4, stream_prefix=stream))
            for stream in (False, True)
        )
        np.testing.assert_array_equal(streamed_bytes, plain_bytes)

    def test_d2ft_and_exports(self):
        model = with_ladder()
        partition = model_partition(model)
        with pytest.raises(UserError, match="or another method than D2FT"):
            find_subnetworks(model, partition)
        costs = model_costs(model, partition, batch_size=4, sequence_length=7)
        with pytest.raises(UserError, match="are not exported"):
            ExportedModel(
                name="it",
                model=model,
                partition=partition,
                example=examples(model),
                batch_size=4,
                sequence_length=7,
                costs=costs,
            )


class TestSavedDirectories:
    def test_another_model_is_refused(self, tmp_path):
        save_model(with_ladder(), tmp_path)
        other = plain()
        with torch.no_grad():
            other.roberta.encoder.layer[0].output.dense.weight[0, 0] += 1
        with pytest.raises(UserError, match="stands beside another model"):
            load_ladder(other, tmp_path)
        assert not hasattr(other, "ladder")
        with pytest.raises(UserError, match="num_labels=2"):
            load_ladder(plain("bert"), tmp_path)

    def test_damage_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="no side network that can be read"):
            load_ladder(plain(), tmp_path)
        save_model(with_ladder(), tmp_path)
        about = json.loads((tmp_path / "ladder.json").read_text())
        (tmp_path / "ladder.json").write_text(json.dumps({**about, "format": 2}))
        with pytest.raises(UserError, match="format 2, not 1"):
            load_ladder(plain(), tmp_path)
        (tmp_path / "ladder.json").write_text(
            json.dumps({**about, "r": 2, "offset": 1})
        )
        with pytest.raises(UserError, match="has other values"):
            load_ladder(plain(), tmp_path)
        (tmp_path / "ladder.json").write_text(json.dumps({**about, "offset": 4}))
        with pytest.raises(UserError, match="is not below its r"):
            load_ladder(plain(), tmp_path)
        (tmp_path / "ladder.json").write_text(json.dumps(about))
        (tmp_path / "ladder.safetensors").write_bytes(b"\0" * 20)
        with pytest.raises(UserError, match="no side network that can be read"):
            load_ladder(plain(), tmp_path)
