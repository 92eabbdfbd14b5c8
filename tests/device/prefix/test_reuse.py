from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lola_flwr.device.prefix import ActivationCache, reused_prefix
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import partition_parameters
from tests.conftest import SMALL


def partition_of(model):
    return partition_parameters(n for n, _ in model.named_parameters())


def text_batch(batch):
    return batch


def image_batch(_):
    torch.manual_seed(2)
    return {
        "pixel_values": torch.randn(6, 3, 8, 8),
        "labels": torch.tensor([0, 1, 1, 0, 1, 0]),
    }


def bert():
    config = transformers.BertConfig(**SMALL, max_position_embeddings=40)
    return transformers.BertForSequenceClassification(config)


def distilbert():
    config = transformers.DistilBertConfig(
        dim=16, hidden_dim=32, n_heads=2, n_layers=3, vocab_size=60
    )
    return transformers.DistilBertForSequenceClassification(config)


def deberta():
    config = transformers.DebertaV2Config(
        **SMALL,
        max_position_embeddings=40,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=3, vocab_size=60, n_positions=40, pad_token_id=1
    )
    return transformers.GPT2ForSequenceClassification(config)


def llama():
    config = transformers.LlamaConfig(**SMALL, pad_token_id=1)
    return transformers.LlamaForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        image_size=8,
        patch_size=4,
    )
    return transformers.ViTForImageClassification(config)


FAMILIES = {
    "bert": (bert, text_batch),
    "distilbert": (distilbert, text_batch),
    "deberta": (deberta, text_batch),
    "gpt2": (gpt2, text_batch),
    "llama": (llama, text_batch),
    "vit": (vit, image_batch),
}


def assert_same(result, expected):
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            result.gradients[name], gradient, rtol=1e-4, atol=1e-7
        )


class Calls:
    """Counts how often each layer of a stack really runs."""

    def __init__(self, layers):
        self.counts = [0] * len(layers)
        for index, layer in enumerate(layers):
            # A stand-in takes the place of the layer, but not of what is inside.
            inner = next(m for m in layer.modules() if isinstance(m, nn.LayerNorm))
            inner.register_forward_hook(
                lambda *_, index=index: self.counts.__setitem__(
                    index, self.counts[index] + 1
                )
            )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_index", [0, 1, 2])
def test_gradient_is_the_plain_one(family, block_index, batch):
    make, make_batch = FAMILIES[family]
    torch.manual_seed(0)
    model, batch = make().eval(), make_batch(batch)
    partition = partition_of(model)
    expected = block_gradient(model, partition, block_index, batch)
    cache = ActivationCache(10**6)
    for _ in ("cold", "warm"):
        with reused_prefix(model, partition, block_index, cache):
            result = block_gradient(model, partition, block_index, batch)
        assert_same(result, expected)
    assert cache.hits == (6 if block_index else 0)
    with reused_prefix(model, partition, block_index):
        assert_same(block_gradient(model, partition, block_index, batch), expected)
    # Nothing stays behind.
    assert_same(block_gradient(model, partition, block_index, batch), expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_below_run_once_per_sample(roberta, batch):
    partition = partition_of(roberta)
    calls = Calls(roberta.roberta.encoder.layer)
    cache = ActivationCache(10**6)
    with reused_prefix(roberta, partition, 2, cache):
        for _ in range(3):
            block_gradient(roberta, partition, 2, batch, micro_batch_size=2)
    assert calls.counts == [3, 3, 9]  # three micro-batches of two samples
    # Over another call, as in the next round.
    with reused_prefix(roberta, partition, 2, cache):
        block_gradient(roberta, partition, 2, batch)
    # One sample shows what a layer returns.
    assert calls.counts == [4, 4, 10]
    assert cache.hits == 2 * 6 + 6


def test_dropout_is_off_below_and_on_above(roberta, batch):
    partition = partition_of(roberta)
    cache = ActivationCache(10**6)
    layer = roberta.roberta.encoder.layer[2]
    roberta.train()

    def gradient(seed):
        torch.manual_seed(seed)
        given = []
        with reused_prefix(roberta, partition, 2, cache):
            hook = layer.register_forward_pre_hook(
                lambda _, args: given.append(args[0])
            )
            result = block_gradient(roberta, partition, 2, batch)
            hook.remove()
        return result, given[0]

    (first, hidden), (again, _), (other, kept) = map(gradient, (1, 1, 2))
    assert_same(again, first)
    assert other.loss != first.loss
    torch.testing.assert_close(kept[:4], hidden[:4])
    assert all(module.training for module in roberta.modules())
    states = []
    layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    roberta.eval()(**batch)
    torch.testing.assert_close(hidden[:4], states[0][:4])


def padded(batch, length):
    width = length - batch["input_ids"].shape[1]
    return {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, width), value=1),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, width)),
        "labels": batch["labels"],
    }


def test_samples_are_found_however_far_they_are_padded(roberta, batch):
    partition = partition_of(roberta)
    cache = ActivationCache(10**6)
    rows = []
    roberta.roberta.encoder.layer[0].output.register_forward_hook(
        lambda module, args, output: rows.append(len(output))
    )
    reference = transformers.RobertaForSequenceClassification(roberta.config).eval()
    reference.load_state_dict(roberta.state_dict())
    with reused_prefix(roberta, partition, 2, cache):
        for given, run in (
            (padded(batch, 14), 6),
            (batch, 1),  # to see that padding makes no difference
            ({name: values[[5, 0, 3]] for name, values in batch.items()}, 0),
            # Farther than ever: what becomes of the padding there is not known yet.
            (padded(batch, 16), 6),
            (padded(batch, 12), 0),
        ):
            rows.clear()
            result = block_gradient(roberta, partition, 2, given)
            assert_same(result, block_gradient(reference, partition, 2, given))
            assert sum(rows) == run


def test_a_loss_may_read_what_becomes_of_padding(roberta, batch):
    # As that of question answering does: every position may be the answer's first.
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.roberta = roberta.roberta

        def forward(self, input_ids, attention_mask, labels):
            states = self.roberta(input_ids, attention_mask).last_hidden_state
            return {"loss": (states[..., 0] * torch.arange(len(states[0]))).mean()}

    model = Whole().eval()
    partition = partition_of(model)

    def loss(model, batch):
        return model(**batch)["loss"]

    def gradient(given):
        return block_gradient(model, partition, 2, given, loss_function=loss)

    batches = [padded(batch, 14), padded(batch, 14), batch]
    expected = [gradient(given) for given in batches]
    cache = ActivationCache(10**6)
    with reused_prefix(model, partition, 2, cache):
        for given, plain in zip(batches, expected, strict=True):
            assert_same(gradient(given), plain)
    assert cache.hits == 12


class Averaging(nn.Module):
    """Below its last layer every position sees all others, padding too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 4)
        self.layers = nn.ModuleList(Mean() for _ in range(3))

    def forward(self, input_ids, attention_mask, labels):
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return {"loss": (states[:, 0] * labels[:, None]).square().mean()}


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, states):
        return states + torch.tanh(self.map(states)).mean(1, keepdim=True)


def test_layers_that_read_padding_are_run_for_every_length(batch):
    torch.manual_seed(0)
    model = Averaging().eval()
    partition = partition_of(model)

    def gradient(given):
        return block_gradient(
            model, partition, 2, given, loss_function=lambda m, b: m(**b)["loss"]
        )

    cache = ActivationCache(10**6)
    given = [padded(batch, 14), batch, batch, padded(batch, 14)]
    expected = [gradient(each) for each in given]
    with reused_prefix(model, partition, 2, cache):
        for each, plain in zip(given, expected, strict=True):
            assert_same(gradient(each), plain)


def test_left_padding_is_told_apart(batch):
    torch.manual_seed(0)
    model = gpt2().eval()
    partition = partition_of(model)
    ids = batch["input_ids"][:2, :7]
    labels = batch["labels"][:2]
    cache = ActivationCache(10**6)
    for width in (0, 3, 5):
        padding = (width, 0)
        shifted = {
            "input_ids": nn.functional.pad(ids, padding, value=1),
            "attention_mask": nn.functional.pad(torch.ones_like(ids), padding),
            "labels": labels,
        }
        expected = block_gradient(model, partition, 2, shifted)
        with reused_prefix(model, partition, 2, cache):
            assert_same(block_gradient(model, partition, 2, shifted), expected)
    assert cache.hits == 0


CHANGES = {
    "in place": lambda p: p.detach().add_(0.1),
    "through data": lambda p: p.data.mul_(1.5),
    "new data": lambda p: setattr(p, "data", p.data + 0.1),
    "through numpy": lambda p: np.add(p.detach().numpy(), 0.1, out=p.detach().numpy()),
    "nothing": lambda p: None,
}


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["embeddings.word", "layer.0", "layer.1", "layer.2"]),
            st.sampled_from(sorted(CHANGES)),
            st.integers(1, 2),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_never_a_stale_activation(steps):
    torch.manual_seed(0)
    model = bert().eval()
    partition = partition_of(model)
    cache = ActivationCache(10**6)
    batch = {
        "input_ids": torch.randint(5, 60, (3, 6)),
        "attention_mask": torch.ones(3, 6, dtype=torch.long),
        "labels": torch.tensor([0, 1, 1]),
    }
    for place, change, block_index in steps:
        name = next(n for n, _ in model.named_parameters() if place in n)
        CHANGES[change](model.get_parameter(name))
        expected = block_gradient(model, partition, block_index, batch)
        with reused_prefix(model, partition, block_index, cache):
            result = block_gradient(model, partition, block_index, batch)
        assert_same(result, expected)


def test_a_change_between_two_steps_is_seen(roberta, batch):
    partition = partition_of(roberta)
    with reused_prefix(roberta, partition, 2, ActivationCache(10**6)):
        before = block_gradient(roberta, partition, 2, batch)
        with torch.no_grad():
            roberta.roberta.encoder.layer[0].output.dense.weight.mul_(3)
        after = block_gradient(roberta, partition, 2, batch)
    assert after.loss != before.loss
    assert_same(block_gradient(roberta, partition, 2, batch), after)


def test_other_weights_of_the_same_shape_share_nothing(batch, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = bert().eval()
        partition = partition_of(model)
        cache = ActivationCache(10**6, tmp_path)
        expected = block_gradient(model, partition, 1, batch)
        with reused_prefix(model, partition, 1, cache):
            assert_same(block_gradient(model, partition, 1, batch), expected)
        assert cache.hits == 0


def test_a_cache_on_disk_serves_a_new_process(roberta, batch, tmp_path):
    partition = partition_of(roberta)
    expected = block_gradient(roberta, partition, 2, batch)
    for hits in (0, 6):
        cache = ActivationCache(10**6, tmp_path)
        with reused_prefix(roberta, partition, 2, cache):
            assert_same(block_gradient(roberta, partition, 2, batch), expected)
        assert cache.hits == hits


def test_a_cache_that_is_too_small_costs_time_only(roberta, batch):
    partition = partition_of(roberta)
    expected = block_gradient(roberta, partition, 2, batch)
    cache = ActivationCache(10 * 16 * 4)
    with reused_prefix(roberta, partition, 2, cache):
        for _ in range(2):
            assert_same(block_gradient(roberta, partition, 2, batch), expected)
    assert cache.num_bytes <= cache.max_bytes


class Skip(nn.Module):
    """Its last layer also reads what the first one gave."""

    def __init__(self, widths=(4, 4, 4)):
        super().__init__()
        sizes = [4, *widths]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(sizes, widths, strict=False)
        )

    def forward(self, x):
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first)) + first

    def loss(self, batch):
        return self(batch["x"]).square().mean()


def skip_gradient(model, loss_function=None, block_index=2):
    partition = partition_of(model)
    with reused_prefix(model, partition, block_index):
        return block_gradient(
            model,
            partition,
            block_index,
            {"x": torch.ones(2, 4)},
            loss_function=loss_function or (lambda model, batch: model.loss(batch)),
        )


def test_what_else_depends_on_the_layers_below_is_refused():
    with pytest.raises(UserError, match="by another way than through it"):
        skip_gradient(Skip())


def test_a_loss_that_is_no_number_is_no_sign_of_it():
    model = Skip()
    model.layers[2].bias.data.fill_(torch.nan)
    assert np.isnan(skip_gradient(model).loss)


class HeadBelow(nn.Module):
    """A norm that is registered behind the layers and runs before them, as BART's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        for layer in (self.norm, *self.layers):
            x = layer(x)
        return x

    loss = Skip.loss


def test_trained_weights_below_the_block_are_refused():
    with pytest.raises(
        UserError, match=r"norm\.weight belongs to the head, but runs before the block"
    ):
        skip_gradient(HeadBelow())


def test_a_layer_whose_output_wants_gradients_by_itself_is_no_such_weight():
    class Detached(nn.Linear):
        def forward(self, x):
            return (super().forward(x)).detach().requires_grad_()

    model = Skip()
    model.layers[0] = Detached(4, 4)
    model.forward = lambda x: model.layers[2](model.layers[1](model.layers[0](x)))
    assert np.isfinite(skip_gradient(model).loss)


class PositionsFirst(nn.Module):
    """Hidden states as XLNet has them: positions first, then samples."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)


@pytest.mark.parametrize("positions", [2, 3])
def test_hidden_states_without_a_row_for_each_sample_are_refused(positions):
    model = PositionsFirst()
    partition = partition_of(model)
    cache = ActivationCache(10**6)
    with (
        reused_prefix(model, partition, 2, cache),
        pytest.raises(UserError, match="not one row for each"),
    ):
        model(torch.ones(2, positions, 4))


class Capacity(nn.Linear):
    """Keeps from an evaluation how many samples it had, as NLLB-MoE's experts do."""

    def forward(self, x):
        self.ran = True
        if not self.training:
            self.capacity = len(x)
        return super().forward(x) * (torch.arange(len(x)) < self.capacity)[:, None]


def test_what_a_pass_below_leaves_behind_is_refused():
    model = HeadBelow()
    model.norm, model.layers[0] = nn.Identity(), Capacity(4, 4)
    model.layers[0].capacity = 8
    with pytest.raises(UserError, match=r"layers\.0\.capacity was 8 and is 2 after"):
        skip_gradient(model)
    # A flag, as of what is set up in the first pass, is no number to compute with.
    model.layers[0].ran = False
    assert np.isfinite(skip_gradient(model).loss)


def test_models_that_do_not_fit_are_refused(batch):
    with pytest.raises(UserError, match=r"\(2, 4\) became \(2, 1\)"):
        skip_gradient(Skip((1, 1, 1)))
    with pytest.raises(UserError, match="apart from the model itself"):
        skip_gradient(Skip(), lambda m, b: m.layers[2](m.layers[1](b["x"])).mean())
    named = Skip()
    named.layers[0].forward = lambda x: {"states": x}
    with pytest.raises(UserError, match=r"\(2, 4\) became dict\. Train"):
        skip_gradient(named)
    mixed = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    names = [n for n, _ in mixed.named_parameters()]
    blocks = partition_parameters(names, blocks=[r"\w\.weight", r"\w\.bias"])
    with pytest.raises(UserError, match="every block is one module"):
        reused_prefix(mixed, blocks, 1)
