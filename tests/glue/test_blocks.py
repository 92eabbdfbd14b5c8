"""The keys of the app that say what the blocks are, and the advice that names them."""

from __future__ import annotations

import peft
import pytest
import transformers as hf

from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlocksNotFound
from lola_glue.config import GlueConfig
from lola_glue.costs import model_blocks, model_costs
from simulations.figures.learning import app_config
from tests.marks import rest_slow

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 40,
}


def config(**changes):
    return GlueConfig.from_run_config(
        {**app_config(), "max-length": 8, "batch-size": 2, **changes}
    )


def modernbert():
    special = {f"{kind}_token_id": 1 for kind in ("bos", "eos", "cls", "sep")}
    return hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**SIZES, **special, pad_token_id=0)
    )


def bart():
    return hf.BartForSequenceClassification(
        hf.BartConfig(
            **{"vocab_size": 60, "d_model": 16, "max_position_embeddings": 40},
            **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        )
    )


def test_the_advice_of_a_refusal_can_be_followed():
    model, stack = bart().eval(), "model.encoder.layers"
    with pytest.raises(BlocksNotFound, match=f"stack='{stack}'"):
        model_blocks(config(), model)
    told = config(stack=stack)
    partition = model_blocks(told, model)
    assert partition.num_blocks == 2
    assert all(block[0].startswith(stack) for block in partition.blocks)
    # What the decoder behind BART's encoder costs follows from no shapes: measured.
    costs = model_costs(told, model)
    assert costs.flops[0] > costs.flops[1]


@pytest.mark.parametrize("tuning", rest_slow(["full", "lora"]))
def test_layers_may_differ_in_a_norm(tuning):
    told = config(tuning=tuning)
    model = modernbert()
    if tuning == "lora":
        adapted = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["Wqkv", "Wo"])
        model = peft.get_peft_model(model, adapted)
    partition = model_blocks(told, model)
    assert partition.num_blocks == 3
    norms = [any("attn_norm" in name for name in block) for block in partition.blocks]
    assert norms == [False, tuning == "full", tuning == "full"]
    costs = model_costs(told, model)
    assert all(costs.flops[:-1] > costs.flops[1:])


def test_blocks_are_given_as_a_regular_expression():
    told = config(blocks=r"model\.(encoder|decoder)\.layers\.\d+")
    assert model_blocks(told, bart()).num_blocks == 4


def test_both_keys_contradict_each_other():
    with pytest.raises(UserError, match="stack='a' and blocks='b' both say"):
        config(stack="a", blocks="b")
