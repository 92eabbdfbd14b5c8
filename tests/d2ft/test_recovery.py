"""Adapters of a pruned model on the whole one: gradients, values, what is saved."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
import transformers as hf

from lola_flwr.app.model import adapted, model_layers, whole_model
from lola_flwr.d2ft.recovery import check_recoverable, recovered
from lola_flwr.device.base_model import check_base
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import base_name, model_partition
from lola_flwr.model.adapter_trial import check_merging, check_saving
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient, only_trainable, train_mode
from lola_flwr.model.loading import fingerprint, load_classifier
from lola_flwr.model.saved_adapters import merge, save_model
from lola_flwr.model.stored_base import evaluation_mode
from lola_flwr.simulation.flower_app import read_app
from lola_glue.config import GlueConfig
from tests.d2ft.pruned_families import (
    HALF,
    batch_of,
    built,
    moved,
    outputs,
    pruned_copy,
    zeroed,
)
from tests.marks import rest_slow
from tests.tree import ROOT

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
ADAPTED = ["roberta", "llama", "gpt2", "modernbert"]
GLUE = read_app(ROOT / "simulations" / "glue").config
TINY = {
    **GLUE,
    "model": "random:roberta-tiny",
    "tuning": "lora",
    "tuning-options": "r=4, target_modules=['query', 'value', 'dense']",
    "pruning": "heads=0.5, neurons=0.25",
}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def pruned_with_adapters(family, **options):
    """Return a base, a pruned one with adapters that were moved, and what was cut."""
    base = built(family)
    pruned, cuts = pruned_copy(base, HALF)
    model = adapt(pruned, "lora", {**LORA, **options}, seed=1)
    check_recoverable(model, cuts, options)
    moved(trained(model))
    return base, model, cuts


def on_whole(base, model, cuts, **options):
    """Return the whole model with the adapters of the pruned one."""
    whole = adapt(copy.deepcopy(base), "lora", {**LORA, **options}, seed=2)
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad:
                found = recovered(name, values[name].detach().numpy(), cuts)
                parameter.copy_(torch.from_numpy(found))
    return whole


def inside(path):
    """Return where a linear map stands under peft's adapters."""
    return f"base_model.model.{path}.base_layer"


@pytest.mark.parametrize("family", rest_slow(ADAPTED, fast=2))
def test_recovered_adapters_do_on_the_whole_model_what_they_did(family):
    """And nothing where heads and neurons were left out."""
    base, model, cuts = pruned_with_adapters(family)
    whole = on_whole(base, model, cuts)
    batch = batch_of(base)
    # The whole base without what was pruned: as the model that was trained.
    torch.testing.assert_close(
        outputs(zeroed(whole, cuts, inside), batch),
        outputs(model, batch),
        rtol=1e-4,
        atol=1e-4,
    )
    merged, small = merge(copy.deepcopy(whole)), merge(copy.deepcopy(model))
    for path, cut in cuts.items():
        change, change_of_pruned = (
            after.get_submodule(path).weight - before
            for after, before in (
                (merged, base.get_submodule(path).weight),
                (small, model.get_submodule(inside(path)).weight),
            )
        )
        is_linear = isinstance(base.get_submodule(path), torch.nn.Linear)
        if (cut.side == "inputs") == is_linear:
            change, change_of_pruned = change.T, change_of_pruned.T
        kept = torch.from_numpy(cut.kept)
        is_gone = torch.ones(cut.width, dtype=torch.bool)
        is_gone[kept] = False
        assert change_of_pruned.any()
        torch.testing.assert_close(change[kept], change_of_pruned)
        assert not change[is_gone].any()


@pytest.mark.parametrize("family", rest_slow(ADAPTED, fast=2))
def test_gradients_are_those_of_the_pruned_model(family):
    base, model, cuts = pruned_with_adapters(family)
    partition = model_partition(model)
    batch = batch_of(base)
    without = zeroed(on_whole(base, model, cuts), cuts, inside)
    for some in (model, without):
        train_mode(some)
        some.eval()  # two models drop other things
    exact = {}
    for some in (model, without):
        with only_trainable(some, partition.trainable) as parameters:
            some(**batch).loss.backward()
            exact[some] = {n: p.grad.clone() for n, p in parameters.items()}
            for parameter in parameters.values():
                parameter.grad = None
    for index in range(partition.num_blocks):
        found = block_gradient(model, partition, index, batch).gradients
        assert found.keys() == set(partition.update_names(index))
        for name, gradient in found.items():
            assert gradient.any()
            torch.testing.assert_close(gradient, exact[model][name])
            # By another way: the whole model's where what was pruned is zero.
            path, _, rest = base_name(name).partition(".lora_")
            of_whole = exact[without][name]
            if path in cuts and (rest[0] == "A") == (cuts[path].side == "inputs"):
                kept = torch.from_numpy(cuts[path].kept)
                of_whole = of_whole.index_select("BA".index(rest[0]), kept)
            torch.testing.assert_close(gradient, of_whole, rtol=1e-3, atol=1e-5)


def loaded(config):
    return load_classifier(config.model, num_labels=2, seed=config.seed)[0]


@pytest.mark.parametrize(
    ("base", "start"),
    rest_slow([("fp32", "true"), ("bf16", "true"), ("int8", "'gaussian'")]),
)
def test_what_a_run_saves_is_the_whole_model(base, start, tmp_path):
    options = f"{TINY['tuning-options']}, init_lora_weights={start}"
    config = GlueConfig.from_run_config(
        {**TINY, "base": base, "tuning-options": options}
    )
    model = adapted(config, loaded(config))
    partition = model_layers(config, model)
    whole = whole_model(config, model, lambda: loaded(config))
    assert whole.model is not model
    moved(trained(model))
    parameters = dict(model.named_parameters())
    values = {n: parameters[n].detach().numpy() for n in partition.trainable}
    whole.load(partition, values)
    batch = batch_of(loaded(config))
    evaluation_mode(whole.model)
    expected = outputs(whole.model, batch)
    assert (expected - outputs(loaded(config), batch)).abs().max() > 1e-3
    check_saving(whole.model, lambda: loaded(config), batch)
    check_merging(whole.model, batch)
    save_model(whole.model, tmp_path / "model")
    if base == "fp32":
        read = peft.PeftModel.from_pretrained(loaded(config), tmp_path / "model")
        torch.testing.assert_close(outputs(read.eval(), batch), expected)
    merge(whole.model).save_pretrained(tmp_path / "merged")
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    difference = (outputs(plain.eval(), batch) - expected).norm() / expected.norm()
    assert difference < (0.02 if base == "bf16" else 1e-4)  # computed in half, too


@pytest.mark.slow
def test_a_pruned_base_is_stored_in_4_bits_too():
    """Devices round what is left; adapters go on the whole base, however it is."""
    config = hf.LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=60,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    base = hf.LlamaForCausalLM(config).eval()
    models = {}
    for stored in ("fp32", "nf4"):
        pruned, cuts = pruned_copy(base, HALF)
        models[stored] = adapt(pruned, "lora", LORA, base=stored, seed=1)
        check_recoverable(models[stored], cuts)
    partition = model_partition(models["nf4"])
    digests = {fingerprint(m, partition.frozen) for m in models.values()}
    assert len(digests) == 1
    moved(trained(models["nf4"]))
    batch = batch_of(base)
    found = block_gradient(models["nf4"], partition, 0, batch).gradients
    assert all(gradient.any() for gradient in found.values())
    whole = on_whole(
        base,
        models["nf4"],
        cuts,
    )
    rounded = adapt(copy.deepcopy(base), "lora", LORA, base="nf4")
    peft.set_peft_model_state_dict(rounded, peft.get_peft_model_state_dict(whole))
    apart = outputs(rounded, batch) - outputs(whole, batch)
    assert 0 < apart.norm() < 0.3 * outputs(whole, batch).norm()


def test_a_run_that_prunes_nothing_has_one_model():
    for pruning in ("", "heads=0, neurons=0.0"):
        config = GlueConfig.from_run_config({**TINY, "pruning": pruning})
        model = adapted(config, loaded(config))
        whole = whole_model(config, model, lambda: pytest.fail("loaded anew"))
        assert whole.model is model


class _Asked:
    def __init__(self, base_fingerprint):
        self.base_fingerprint = base_fingerprint


@pytest.mark.parametrize(
    "pruning",
    rest_slow(
        [
            "",
            "heads=0.5",
            "heads=0.5, neurons=0.5",
            "heads=0.5, neurons=0.25, criterion='random'",
        ],
        1,
    ),
)
def test_a_device_with_another_pruned_base_is_refused(pruning):
    def made(text):
        config = GlueConfig.from_run_config({**TINY, "pruning": text})
        model = adapted(config, loaded(config))
        return model, model_layers(config, model)

    model, partition = made(TINY["pruning"])
    asked = _Asked(fingerprint(model, partition.frozen))
    check_base(*made(TINY["pruning"]), asked)
    with pytest.raises(UserError, match="base weights of this device differ"):
        check_base(*made(pruning), asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"is not of plain LoRA"),
        ({"init_lora_weights": "pissa"}, r"'pissa' begins with what"),
        ({"bias": "all"}, r"bias is trained in full, and pruning left a part"),
        (
            {"modules_to_save": ["intermediate"], "target_modules": ["query"]},
            r"intermediate\.dense\.weight is trained in full",
        ),
        (
            {"modules_to_save": ["value"], "target_modules": ["query"]},
            r"self\.value\.weight is trained in full",
        ),
    ],
)
def test_what_is_not_recovered_is_refused(options, message):
    with pytest.raises(UserError, match=message) as raised:
        pruned_with_adapters("roberta", **options)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_adapters_do_not_make_up_for_what_a_pruned_base_has_lost():
    start = f"{TINY['tuning-options']}, init_lora_weights='loftq'"
    config = GlueConfig.from_run_config(
        {**TINY, "base": "int8", "tuning-options": start}
    )
    with pytest.raises(UserError, match=r"='loftq' begins with what .*'gaussian'"):
        adapted(config, loaded(config))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tuning": "full", "tuning-options": ""}, r"is of a base under LoRA"),
        ({"tuning": "vera"}, r"tuning='vera' is not recovered .* use tuning=\"lora\""),
        ({"start-from": "runs/first"}, r"change of the whole base, .* drop one"),
        ({"pruning": "heads=1.5"}, r"pruning='heads=1\.5': heads=1\.5 must be"),
        ({"pruning": "head=0.5"}, r"Did you mean 'heads'\?"),
        ({"pruning": "heads"}, r"Write options as"),
        (
            {"method": "d2ft", "interface": "message", "own-examples": "auto"},
            r"does not go with method=\"d2ft\"",
        ),
    ],
)
def test_keys_that_do_not_go_with_it_are_refused(keys, message):
    with pytest.raises(UserError) as raised:
        GlueConfig.from_run_config({**TINY, **keys})
    assert re.search(message, str(raised.value))
    assert "\n" not in str(raised.value)
