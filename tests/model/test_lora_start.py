"""LoRA that begins as what a first stage has changed (SLoRA)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as hf

from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.loading import fingerprint
from lola_flwr.model.lora_start import begin_from
from lola_flwr.model.saved_adapters import merge, save_model
from tests.conftest import SMALL
from tests.model.test_own_tuners import logits, moved, roberta

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["query", "value"]


def lora(model=None, rank=3, **options):
    given = {"r": rank, "lora_alpha": 7, "target_modules": TARGETS, **options}
    return adapt(roberta() if model is None else model, "lora", given)


def first_stage(directory, tuning="shira", model=None, **options):
    """Train a sparse update, as it were; return the model that is saved."""
    given = {"r": 2, "target_modules": TARGETS, **options}
    whole = adapt(roberta() if model is None else model, tuning, given)
    merged = merge(moved(whole))
    merged.save_pretrained(directory)
    return merged.eval()


def products(model):
    """Return what LoRA adds to each matrix [in the base's own layout], by its path."""
    return {
        path: module.get_delta_weight("default").detach().double().numpy()
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("rank", [1, 3, 16, 40])
def test_adapters_begin_as_the_best_of_their_rank(rank, tmp_path):
    saved = first_stage(tmp_path)
    model = lora(rank=rank)
    frozen = model_partition(model).frozen
    digest = fingerprint(model, frozen)
    said = begin_from(model, tmp_path)
    total = kept = 0.0
    for path, product in products(model).items():
        name = path.removeprefix("base_model.model.") + ".weight"
        change = (saved.get_parameter(name) - roberta().get_parameter(name)).detach()
        left, sizes, right = np.linalg.svd(change.double().numpy())
        best = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        np.testing.assert_allclose(product, best, atol=2e-5)
        total += np.square(sizes).sum()
        kept += np.square(sizes[:rank]).sum()
    assert (
        said == f"LoRA begins as {kept / total:.1%} of the squared change of 6 matrices"
    )
    # On the base as it was, with the classifier as it has become.
    assert fingerprint(copy.deepcopy(model), frozen) == digest
    if rank >= 16:
        torch.testing.assert_close(logits(model), logits(saved), rtol=0, atol=1e-5)


def test_no_pair_begins_with_two_zeros(tmp_path):
    """Neither of them would have a gradient."""
    first_stage(tmp_path, tuning="lora", lora_alpha=4)  # of rank 2
    model = lora(rank=5)
    usual = lora(rank=5)
    begin_from(model, tmp_path)
    for (path, one), (_, other) in zip(
        model.named_modules(), usual.named_modules(), strict=True
    ):
        if hasattr(one, "lora_A"):
            first, second = one.lora_A["default"].weight, one.lora_B["default"].weight
            assert (first.abs().sum(1) > 0).all(), path
            assert torch.equal(first[2:], other.lora_A["default"].weight[2:])
            assert not second[:, 2:].any()


def test_what_the_rank_or_the_targets_leave_out_is_told(tmp_path):
    first_stage(tmp_path, target_modules=[*TARGETS, "key"])
    said = begin_from(lora(), tmp_path)
    share = float(said.split("; ")[1].split("%")[0])
    # A third of the change is in the keys.
    assert 25 < share < 42
    assert said.endswith("of all, elsewhere, is left out")


def test_a_matrix_that_is_held_turned(tmp_path):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}

    def gpt2():
        torch.manual_seed(0)
        config = hf.GPT2Config(**sizes, n_positions=20, pad_token_id=0)
        return hf.GPT2ForSequenceClassification(config).eval()

    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    saved = first_stage(tmp_path, "lora", gpt2(), lora_alpha=4, **targets)
    model = lora(gpt2(), rank=2, **targets)
    begin_from(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(saved), rtol=0, atol=1e-5)


def test_it_is_saved_as_any_other(tmp_path):
    from peft import PeftModel

    first_stage(tmp_path / "first")
    model = lora()
    begin_from(model, tmp_path / "first")
    save_model(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(roberta(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("base", ["bf16", "int8"])
def test_on_a_base_in_fewer_bits_it_makes_up_for_the_rounding(base, tmp_path):
    if base == "int8":
        pytest.importorskip("bitsandbytes")
    saved = first_stage(tmp_path)
    options = {"r": 16, "target_modules": TARGETS}
    model = adapt(roberta(), "lora", options, base=base)
    begin_from(model, tmp_path)
    plain = merge(model)
    for name, values in plain.named_parameters():
        if "query.weight" in name:
            torch.testing.assert_close(
                values, saved.get_parameter(name), rtol=0, atol=1e-5
            )


def refused(model, directory, match):
    with pytest.raises(UserError, match=match) as raised:
        begin_from(model, directory)
    assert "\n" not in str(raised.value)


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (roberta, "use tuning='lora' with it"),
            (lambda: adapt(roberta(), "paca"), "use tuning='lora' with it"),
            (lambda: lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
            (lambda: lora(lora_bias=True), "lora_bias=True"),
            (lambda: lora(use_dora=True), "adapters of DoraLinearVariant"),
        ],
    )
    def test_other_adapters(self, make, match, tmp_path):
        refused(make(), tmp_path, match)

    def test_what_holds_no_model(self, tmp_path):
        refused(lora(), tmp_path / "none", "has no config.json; give the directory")
        save_model(moved(lora()), tmp_path / "adapter")
        refused(lora(), tmp_path / "adapter", "holds adapters without their base")
        first_stage(tmp_path / "cut")
        weights = tmp_path / "cut" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-40])
        refused(lora(), tmp_path / "cut", "cannot be loaded")

    def test_a_model_that_is_another(self, tmp_path):
        roberta(hidden_size=32).save_pretrained(tmp_path / "wide")
        refused(lora(), tmp_path / "wide", r"\(.*16\) here and \(.*32\) there")
        roberta(num_hidden_layers=1).save_pretrained(tmp_path / "short")
        refused(lora(), tmp_path / "short", "no such parameter there")
        config = hf.RobertaConfig(**{**SMALL, "max_position_embeddings": 40})
        hf.RobertaForMaskedLM(config).save_pretrained(tmp_path / "words")
        refused(lora(), tmp_path / "words", "lacks classifier.dense.bias: it is no")
        named = roberta()
        named.config.id2label = {0: "bad", 1: "good"}
        named.save_pretrained(tmp_path / "named")
        refused(lora(), tmp_path / "named", "tells bad, good apart, and this run LABEL")

    def test_a_model_that_learned_nothing_here(self, tmp_path):
        roberta().save_pretrained(tmp_path / "base")
        refused(lora(), tmp_path / "base", "the base's own values wherever LoRA")
        first_stage(tmp_path / "keys", target_modules=["key"])
        refused(lora(), tmp_path / "keys", "the base's own values wherever LoRA")

    def test_values_that_are_not_finite(self, tmp_path):
        broken = roberta()
        with torch.no_grad():
            broken.classifier.out_proj.bias[0] = torch.nan
            broken.roberta.encoder.layer[0].attention.self.query.weight[0, 0] += 1
        broken.save_pretrained(tmp_path)
        refused(lora(), tmp_path, "classifier.out_proj.bias has values that are not")
