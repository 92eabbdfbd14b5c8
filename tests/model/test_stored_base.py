"""Bases in half precision, 4 and 8 bits: gradients, fingerprints, what is saved."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as hf

from lola_causal.embedded import embedded_tokenizer
from lola_flwr.device.prefix import ActivationCache, reused_prefix
from lola_flwr.device.prefix.streaming import LayeredWeights, StreamedModel, save_base
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import base_weights, model_partition
from lola_flwr.model.adapter_trial import check_merging, check_saving
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient, only_trainable, train_mode
from lola_flwr.model.causal import load_causal_lm
from lola_flwr.model.loading import fingerprint
from lola_flwr.model.saved_adapters import SAVED_BASE, merge, save_model
from lola_flwr.model.stored_base import (
    evaluation_mode,
    quantised_modules,
    store_base,
    stored_values,
    weight_of,
)
from tests.marks import rest_slow

STORED = ("nf4", "int8", "bf16")
OPTIONS = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
CONFIG = hf.LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_hidden_layers=3,
    vocab_size=50,
    max_position_embeddings=32,
    pad_token_id=0,
)
TOKENS = torch.randint(1, 50, (3, 8), generator=torch.Generator().manual_seed(1))
FEW = {"input_ids": TOKENS}
BATCH = {**FEW, "labels": TOKENS}


def base_model(seed=0):
    torch.manual_seed(seed)
    return hf.LlamaForCausalLM(CONFIG).eval()


def adapted(base="fp32", seed=0, **options):
    return adapt(base_model(seed), "lora", {**OPTIONS, **options}, base=base, seed=1)


def moved(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def outputs(model):
    evaluation_mode(model)
    with torch.no_grad():
        return model(**FEW).logits.float()


def stored(model, base):
    """Store the base of a model without adapters."""
    store_base(
        model.requires_grad_(False), base, [n for n, _ in model.named_parameters()]
    )
    return model


@pytest.mark.parametrize("base", rest_slow(STORED))
def test_gradients_are_those_of_full_back_propagation(base):
    model = moved(adapted(base))
    partition = model_partition(model)
    outputs(model)  # after an evaluation, too
    train_mode(model)
    with only_trainable(model, partition.trainable) as trained:
        model(**BATCH).loss.backward()
        full = {name: p.grad.clone() for name, p in trained.items()}
        for parameter in trained.values():
            parameter.grad = None
    for index in range(partition.num_blocks):
        found = block_gradient(model, partition, index, BATCH).gradients
        assert found.keys() == set(partition.update_names(index))
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            assert gradient.any()
            torch.testing.assert_close(gradient, full[name])


def test_a_base_has_one_fingerprint_however_it_is_stored():
    models = {base: adapted(base) for base in ("fp32", "nf4")}
    names = model_partition(models["fp32"]).frozen
    digests = {base: fingerprint(model, names) for base, model in models.items()}
    assert len(set(digests.values())) == 1
    outputs(models["nf4"])  # bitsandbytes moves things then
    assert fingerprint(models["nf4"], names) == digests["fp32"]
    assert fingerprint(adapted("nf4", seed=3), names) != digests["fp32"]
    # Scales are of the base, too: codes alone do not tell.
    layer = next(iter(quantised_modules(models["nf4"]).values()))
    layer.weight.quant_state.absmax *= 2
    layer.weight.data = layer.weight.data.clone()
    assert fingerprint(models["nf4"], names) != digests["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("base", STORED)
@pytest.mark.parametrize("start", [True, "pissa", "olora"])
def test_every_base_has_the_fingerprint_of_fp32(base, start):
    plain, other = (
        adapted(init_lora_weights=start),
        adapted(base, init_lora_weights=start),
    )
    names = model_partition(plain).frozen
    assert model_partition(other).frozen == names
    assert fingerprint(other, names) == fingerprint(plain, names)


def test_half_types_count_as_what_they_are_in_float32():
    half = base_model().to(torch.bfloat16)
    full = copy.deepcopy(half).float()
    names = [name for name, _ in half.named_parameters()]
    assert fingerprint(half, names) == fingerprint(full, names)
    assert fingerprint(base_model(), names) != fingerprint(full, names)


@pytest.mark.parametrize("base", rest_slow(["nf4", "int8"]))
def test_a_quantised_base_is_that_of_bitsandbytes(base):
    """As transformers quantises: the layers alone, and rounded again to the same."""
    model = stored(base_model(), base)
    assert len(quantised_modules(model)) == 7 * CONFIG.num_hidden_layers
    assert type(model.lm_head) is torch.nn.Linear
    once = base_model()
    for path, module in quantised_modules(model).items():
        before = once.get_submodule(path).weight
        worst = (weight_of(module) - before).abs().max() / before.abs().max()
        assert 0 < worst < (0.2 if base == "nf4" else 0.01)
        once.get_submodule(path).weight.data = weight_of(module)
    twice = stored(once, base)
    for path, module in quantised_modules(model).items():
        torch.testing.assert_close(
            weight_of(twice.get_submodule(path)), weight_of(module), rtol=1e-6, atol=0
        )


@pytest.mark.slow
@pytest.mark.parametrize("base", STORED)
@pytest.mark.parametrize("start", [True, "pissa", "olora", "loftq"])
def test_saved_adapters_fit_the_base_that_they_are_loaded_on(base, start, tmp_path):
    if (base, start) == ("bf16", "loftq"):
        return
    model = moved(adapted(base, init_lora_weights=start))
    save_model(model, tmp_path)
    loaded = base_model()
    assert (tmp_path / SAVED_BASE).exists() == (start in ("pissa", "olora"))
    if start in ("pissa", "olora"):
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / SAVED_BASE)
    read = peft.PeftModel.from_pretrained(stored(loaded, base), tmp_path)
    torch.testing.assert_close(outputs(read), outputs(model), rtol=1e-4, atol=1e-4)
    check_saving(model, base_model, FEW)
    check_merging(model, FEW)
    merged = merge(copy.deepcopy(model)) if base != "bf16" else None
    if merged is not None:
        assert not quantised_modules(merged)
        torch.testing.assert_close(
            outputs(merged), outputs(model), rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [4, 2])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_loftq_begins_with_the_best_of_its_rank_that_is_lost(base, alpha):
    model = adapted(base, lora_alpha=alpha, init_lora_weights="loftq")
    before = base_model()
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }
    assert len(layers) == 6
    for name, layer in layers.items():
        weight = before.get_submodule(name.removeprefix("base_model.model.")).weight
        lost = (weight - weight_of(layer.base_layer)).detach()
        left = lost - layer.get_delta_weight("default").detach()
        # Eckart, Young and Mirsky.
        tail = torch.linalg.svdvals(lost)[4:].norm()
        torch.testing.assert_close(left.norm(), tail, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("base", "tuning", "options", "message"),
    [
        ("nf5", "lora", {}, "choose from fp32, bf16, nf4, int8"),
        ("nf4", "full", {}, "trains the base itself"),
        ("nf4", "loha", {"target_modules": ["q_proj"]}, "not on quantised ones"),
        ("bf16", "lora", {"init_lora_weights": "loftq"}, "base='nf4' or 'int8'"),
        (
            "nf4",
            "lora",
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
            "leave it out",
        ),
    ],
)
def test_what_is_refused(base, tuning, options, message):
    with pytest.raises(UserError, match=message) as raised:
        adapt(base_model(), tuning, options, base=base)
    assert "\n" not in str(raised.value)


def test_a_base_is_not_quantised_twice():
    model = stored(base_model(), "nf4")
    with pytest.raises(UserError, match="quantised already") as raised:
        adapt(model, "lora", OPTIONS, base="int8")
    assert "\n" not in str(raised.value)
    assert model_partition(adapt(model, "lora", OPTIONS)).num_blocks == 3


@pytest.mark.slow
def test_a_layer_that_was_repacked_for_inference_is_refused():
    """bitsandbytes does so on CPUs with bfloat16 instructions."""
    model = adapted("nf4")
    layer = next(iter(quantised_modules(model).values()))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match=r"has repacked .* no gradients"):
        block_gradient(model, model_partition(model), 0, BATCH)


@pytest.mark.slow
def test_what_files_hold_quantised_is_trained(tmp_path):
    """Loading tries the model in evaluation mode, before it has adapters."""
    quantised = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    config = copy.deepcopy(CONFIG)
    tokenizer = embedded_tokenizer()
    config.vocab_size = len(tokenizer)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "full")
    model = hf.LlamaForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=quantised
    )
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "nf4")
    loaded, _ = load_causal_lm(str(tmp_path / "nf4"))
    model = moved(adapt(loaded, "lora", OPTIONS))
    found = block_gradient(model, model_partition(model), 0, BATCH)
    assert all(gradient.any() for gradient in found.gradients.values())


def test_rows_that_are_no_whole_blocks_are_refused():
    """bitsandbytes 0.50 takes other rows' scales for them, on a CPU."""
    config = copy.deepcopy(CONFIG)
    config.intermediate_size = 96
    model = hf.LlamaForCausalLM(config)
    with pytest.raises(UserError, match=r"down_proj reads 96 features.*int8") as raised:
        adapt(model, "lora", OPTIONS, base="nf4")
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_gpt2_has_no_linear_maps():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=16, n_head=2))
    with pytest.raises(UserError, match="no linear maps"):
        adapt(model, "lora", {"r": 2}, base="nf4")


@pytest.mark.slow
@pytest.mark.parametrize("base", STORED)
def test_layers_below_run_once_and_give_the_same(base):
    model = moved(adapted(base))
    partition = model_partition(model)
    train_mode(model)
    expected = block_gradient(model, partition, 2, BATCH).gradients
    cache = ActivationCache(1 << 20)
    for hits in (0, len(TOKENS)):
        with reused_prefix(model, partition, 2, cache):
            train_mode(model)
            found = block_gradient(model, partition, 2, BATCH).gradients
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
        assert cache.hits == hits
    # Another base has other outputs.
    other = moved(adapted(base, seed=3))
    with reused_prefix(other, partition, 2, cache):
        block_gradient(other, partition, 2, BATCH)
    assert cache.hits == len(TOKENS)


@pytest.mark.slow
def test_a_half_base_is_streamed_and_a_quantised_one_is_refused(tmp_path):
    from lola_flwr.device.prefix.streaming import skeleton_of

    whole = moved(adapted("bf16"))
    partition = model_partition(whole)
    save_base(adapted(), tmp_path / "base")
    skeleton = skeleton_of(lambda: adapted("bf16"))
    weights = LayeredWeights(tmp_path / "base", tmp_path / "changed")
    streamed = StreamedModel(skeleton, partition, weights)
    assert streamed.fingerprint() == fingerprint(whole, partition.frozen)
    parameters = dict(whole.named_parameters())
    values = [parameters[n].detach().numpy() for n in partition.trainable]
    streamed.load(partition.trainable, values)
    train_mode(whole)
    expected = block_gradient(whole, partition, 1, BATCH).gradients
    with streamed.at_block(1) as model:
        train_mode(model)
        found = block_gradient(model, partition, 1, BATCH).gradients
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    with pytest.raises(UserError, match="cannot be quantised"):
        skeleton_of(lambda: adapted("nf4"))
    with pytest.raises(UserError, match="cannot be streamed"):
        StreamedModel(adapted("nf4"), partition, weights)


@pytest.mark.slow
def test_values_are_what_is_computed_with():
    model = stored(base_model(), "int8")
    name = "model.layers.0.mlp.up_proj.weight"
    before = stored_values(model, name)
    outputs(model)
    torch.testing.assert_close(stored_values(model, name), before)
    assert base_weights([name]) == []
