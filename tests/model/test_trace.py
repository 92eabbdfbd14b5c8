"""What runs before, behind and beside the blocks, against the models themselves."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers as hf
from torch import nn

from lola_flwr.device.prefix import skeleton_of
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.blocks import BlocksNotFound
from lola_flwr.model.example import example_of
from lola_flwr.model.trace import traced
from tests.conftest import SMALL

BART = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
}
TEXT = {**SMALL, "max_position_embeddings": 40}


def modules_of(names):
    return {name.rpartition(".")[0] for name in names}


# Head modules, where the order of names would give others.
HEADS = {
    # The classifier is registered in front of the model that feeds it.
    "XLMRobertaForSequenceClassification": (
        TEXT,
        {},
        {"classifier.dense", "classifier.out_proj"},
    ),
    "CamembertForTokenClassification": (TEXT, {}, {"classifier"}),
    "XLMRobertaForMaskedLM": (
        TEXT,
        {},
        {"lm_head", "lm_head.dense", "lm_head.layer_norm"},
    ),
    # The embeddings' norm is registered behind the layers that it feeds.
    "BartForSequenceClassification": (
        BART,
        {"stack": "model.decoder.layers"},
        {"classification_head.dense", "classification_head.out_proj"},
    ),
    # So is the last norm in front of the layers.
    "OPTForSequenceClassification": (
        {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 1},
        {},
        {"model.decoder.final_layer_norm", "score"},
    ),
}


def built(name):
    sizes, chosen, head = HEADS[name]
    model_class = getattr(hf, name)
    return model_class(model_class.config_class(**sizes)), chosen, head


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_what_the_blocks_feed(name):
    model, chosen, head = built(name)
    assert modules_of(model_partition(model, **chosen).head) == head


@pytest.mark.parametrize(
    "name", ["XLMRobertaForSequenceClassification", "BartForSequenceClassification"]
)
def test_so_it_is_with_adapters(name):
    model, chosen, head = built(name)
    stack = chosen.get("stack", "roberta.encoder.layer")
    target = rf"{stack}\..*(query|q_proj)"
    partition = model_partition(
        adapt(model, "lora", {"r": 2, "target_modules": target}), **chosen
    )
    trained = {name.partition(".modules_to_save.")[0] for name in partition.head}
    assert trained == {"base_model.model." + path.partition(".")[0] for path in head}
    assert all("lora" in name for block in partition.blocks for name in block)


class Steps(nn.Module):
    """Layers, run in some order, between what stands before and behind them."""

    def __init__(self, order=(0, 1, 2)):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.stem = nn.Linear(4, 4)
        self.beside = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 4)
        self.order = order

    def forward(self, x):
        states = self.stem(x)
        for index in self.order:
            states = states + torch.tanh(self.layers[index](states))
        return self.fc(states) + self.beside(x)


EXAMPLE = torch.ones(1, 4)


def test_a_plain_model_is_seen_on_an_example():
    partition = model_partition(Steps(), example=EXAMPLE)
    assert modules_of(partition.head) == {"fc", "beside"}
    assert modules_of(partition.frozen) == {"stem", "unused"}
    # Without one the names are taken for the order.
    by_name = model_partition(Steps())
    assert modules_of(by_name.head) == {"stem", "beside", "unused"}


def test_an_example_may_hold_other_values_than_tensors():
    class Net(nn.Sequential):
        def forward(self, x, twice):
            return (1 + twice) * super().forward(x)

    model = Net(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(3)), nn.Linear(2, 1))
    example = {"x": torch.ones(1, 2), "twice": True}
    partition = model_partition(model, blocks="[0-2]", example=example)
    assert modules_of(partition.head) == {"3"}


def test_blocks_are_numbered_as_they_run():
    partition = model_partition(Steps(order=(2, 0, 1)), example={"x": EXAMPLE})
    assert [block[0] for block in partition.blocks] == [
        f"layers.{index}.weight" for index in (2, 0, 1)
    ]
    assert partition.depth(0) == 3


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 1), r"does not depend on block 2 \(layers\.2\.weight"),
        ((0, 1, 2, 1), r"Blocks 1 and 2 .* do not run one after the other"),
    ],
)
def test_blocks_that_are_no_chain_are_refused(order, message):
    with pytest.raises(BlocksNotFound, match=message) as refusal:
        model_partition(Steps(order), example=EXAMPLE)
    assert "\n" not in str(refusal.value)


def test_blocks_beside_each_other_are_refused():
    class Beside(Steps):
        def forward(self, x):
            return self.fc(sum(layer(x) for layer in self.layers))

    with pytest.raises(BlocksNotFound, match="Blocks 0 and 1"):
        model_partition(Beside(), example=EXAMPLE)


def test_another_stack_behind_is_found_whatever_was_registered_first():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            make = nn.TransformerEncoderLayer
            self.decoder = nn.ModuleList(make(4, 1, 4) for _ in range(2))
            self.encoder = nn.ModuleList(make(4, 1, 4) for _ in range(3))

        def forward(self, x):
            for layer in (*self.encoder, *self.decoder):
                x = layer(x)
            return x

    example = torch.ones(2, 1, 4)
    with pytest.raises(BlocksNotFound, match="'encoder' stand those of 'decoder'") as e:
        model_partition(Two(), example=example)
    assert e.value.stacks == ("encoder", "decoder")
    both = model_partition(Two(), blocks=r"(encoder\.|decoder\.)\d+", example=example)
    assert [block[0].split(".")[0] for block in both.blocks] == [
        *["encoder"] * 3,
        *["decoder"] * 2,
    ]


def test_a_stack_that_never_runs_is_not_meant():
    class WithImages(Steps):
        def __init__(self):
            super().__init__()
            make = nn.TransformerEncoderLayer
            self.images = nn.ModuleList(make(4, 1, 4) for _ in range(5))

    partition = model_partition(WithImages(), example=EXAMPLE)
    assert modules_of(partition.blocks[2]) == {"layers.2"}
    assert any(name.startswith("images.4.") for name in partition.frozen)
    with pytest.raises(BlocksNotFound, match=r"does not depend on block 0 \(images"):
        model_partition(WithImages(), stack="images", example=EXAMPLE)


def test_what_no_gradient_reaches_stays_frozen():
    class Chosen(nn.Module):
        """A layer that chooses by weights, as DeepSeek's indexer does."""

        def __init__(self):
            super().__init__()
            self.map, self.choose = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                best = self.choose(x).argmax(-1, keepdim=True)
            return x + self.map(x.gather(-1, best).expand_as(x))

    model = Steps()
    model.layers = nn.ModuleList(Chosen() for _ in range(3))
    partition = model_partition(model, example=EXAMPLE)
    assert modules_of(partition.blocks[1]) == {"layers.1.map"}
    assert "layers.1.choose.weight" in partition.frozen


def test_the_model_and_random_numbers_stay_as_they_were(roberta):
    roberta.train()
    roberta.roberta.pooler = None
    frozen = roberta.classifier.dense.weight.requires_grad_(False)
    roberta.roberta.encoder.layer[1].eval()
    modes = [module.training for module in roberta.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    traced(roberta, example_of(roberta))
    assert torch.rand(1) == expected
    assert [module.training for module in roberta.modules()] == modes
    assert not frozen.requires_grad
    assert all(p.requires_grad or p is frozen for p in roberta.parameters())
    assert not any(module._forward_hooks for module in roberta.modules())


def test_nothing_is_kept_for_a_backward_pass(roberta):
    first, *_, last = roberta.roberta.encoder.layer
    inner, alive = [], []
    first.intermediate.register_forward_hook(
        lambda _, args, output: inner.append(weakref.ref(output))
    )
    last.register_forward_hook(lambda *_: alive.append(inner[-1]() is not None))
    roberta(**example_of(roberta))
    traced(roberta, example_of(roberta))
    assert alive == [True, False]


def test_a_model_without_weights_is_divided_as_the_one_with_them(roberta):
    skeleton = skeleton_of(lambda: hf.RobertaForSequenceClassification(roberta.config))
    assert next(skeleton.parameters()).is_meta
    assert model_partition(skeleton) == model_partition(roberta)


def test_a_model_that_cannot_be_run_on_the_example_is_refused(roberta):
    with pytest.raises(UserError, match=r"exactly one of .*; pass example=") as refusal:
        model_partition(roberta, example={"pixels": EXAMPLE})
    assert "\n" not in str(refusal.value)
    roberta.main_input_name = "scent"
    with pytest.raises(UserError, match="takes as input is not known here; pass"):
        model_partition(roberta)


def test_a_model_in_another_type_is_seen_on_the_same_example():
    model = Steps().to(torch.bfloat16)
    assert model_partition(model, example=EXAMPLE) == model_partition(
        Steps(), example=EXAMPLE
    )
