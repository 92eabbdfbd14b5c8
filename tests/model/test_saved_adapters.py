"""Adapters that are saved, read back and merged."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapter_trial import _OtherSigns, check_merging, check_saving
from lola_flwr.model.adapters import adapt
from lola_flwr.model.saved_adapters import SAVED_BASE, merge, save_model
from tests.conftest import SMALL
from tests.marks import rest_slow

pytestmark = pytest.mark.filterwarnings("ignore")

DISTILBERT = transformers.DistilBertConfig(
    dim=16, hidden_dim=32, n_heads=2, n_layers=3, vocab_size=60
)
CONFIGS = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL, max_position_embeddings=40),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=8),
    "distilbert": DISTILBERT,
    "xlnet": transformers.XLNetConfig(
        d_model=16, d_inner=32, n_head=2, n_layer=3, vocab_size=60
    ),
    "llama": transformers.LlamaConfig(**SMALL, pad_token_id=1),
}
HEADS = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}
INPUTS = {"input_ids": torch.arange(3, 13)[None]}


def plain(family="roberta", head="SEQ_CLS", seed=0):
    torch.manual_seed(seed)
    return HEADS[head].from_config(CONFIGS[family]).eval()


def outputs(model):
    with torch.inference_mode():
        output = model(**INPUTS)
    return output.logits if "logits" in output else output.start_logits


def moved(model):
    """Move the trained values to where a lost one shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def unshared_lily():
    """Return a tuner that can be divided and saved, but not merged."""
    layers = range(SMALL["num_hidden_layers"])
    names = [f"roberta.encoder.layer.{i}.attention.self.query" for i in layers]
    return "lily", {"target_modules": names}


@pytest.mark.parametrize("head", rest_slow(HEADS))
@pytest.mark.parametrize("family", CONFIGS)
def test_the_task_type_leaves_heads_as_they_are(family, head, tmp_path):
    named = moved(adapt(plain(family, head), "lora", {"task_type": head}))
    unnamed = adapt(plain(family, head), "lora")
    assert model_partition(named) == model_partition(unnamed)
    save_model(named, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        plain(family, head, seed=0), tmp_path / "adapter"
    )
    expected = outputs(named)
    torch.testing.assert_close(outputs(loaded.eval()), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs(merge(named)), expected, rtol=1e-5, atol=1e-5)


class TestTrial:
    @pytest.mark.parametrize(
        ("tuning", "options"),
        [
            ("lora", {"task_type": "SEQ_CLS"}),
            ("lora", {"init_lora_weights": "pissa"}),
            ("vera", {"r": 4}),
            ("lntuning", {}),
        ],
    )
    def test_leaves_the_model_and_the_random_numbers_alone(self, tuning, options):
        model = adapt(plain(), tuning, options)
        bases = [plain(), plain()]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        check_saving(model, bases.pop, INPUTS)
        check_merging(model, INPUTS)
        torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name
        assert not model.training

    def test_without_adapters_nothing_is_tried(self):
        check_saving(plain(), lambda: pytest.fail("loaded"), INPUTS)
        check_merging(plain(), INPUTS)

    def test_what_peft_does_not_read_back(self):
        options = {"modules_to_save": ["classifier", "out_proj"]}
        model = peft.get_peft_model(plain(), peft.LoraConfig(**options))
        with pytest.raises(UserError, match=r"cannot be read back \(KeyError: ") as one:
            check_saving(model, plain, INPUTS)
        assert "\n" not in str(one.value)

    def test_what_does_not_run_as_it_is_read_back(self):
        def of_fewer_words():
            config = copy.deepcopy(CONFIGS["roberta"])
            config.vocab_size = 4
            return HEADS["SEQ_CLS"].from_config(config).eval()

        model = adapt(plain(), "lora")
        with pytest.raises(UserError, match=r"cannot be read back .*save it") as one:
            check_saving(model, of_fewer_words, INPUTS)
        assert "\n" not in str(one.value)

    def test_a_trained_value_that_is_not_saved(self):
        model = adapt(plain(), "lora")
        model.base_model.model.roberta.embeddings.LayerNorm.weight.requires_grad_(True)
        with pytest.raises(UserError, match=r"without .*LayerNorm\.weight\)"):
            check_saving(model, plain, INPUTS)

    def test_another_base(self):
        model = adapt(plain(), "lora")
        with pytest.raises(UserError, match=r"another model \(outputs differ by"):
            check_saving(model, lambda: plain(seed=1), INPUTS)

    # They decompose the base anew as they are read: k-means of singular vectors jumps
    # with the last bits, and entries beside a diagonal change their sign with vectors.
    @pytest.mark.parametrize("tuning", ["adamss", "frod", "psoft"])
    def test_what_another_machine_reads_as_another_model(self, tuning):
        config = transformers.RobertaConfig(
            **{**SMALL, "hidden_size": 64}, max_position_embeddings=40
        )

        def base():
            torch.manual_seed(0)
            return transformers.RobertaForSequenceClassification(config).eval()

        model = adapt(base(), tuning)
        with pytest.raises(
            UserError, match=r"on a machine that decomposes .*save it merged"
        ):
            check_saving(model, base, INPUTS)
        check_merging(model, INPUTS)

    @pytest.mark.parametrize("tuning", ["osf", "tinylora"])
    def test_decompositions_that_do_no_harm(self, tuning):
        check_saving(
            adapt(plain(), tuning, {"target_modules": ["query"]}), plain, INPUTS
        )

    def test_what_cannot_be_merged(self):
        model = adapt(plain(), *unshared_lily())
        assert model_partition(model).num_blocks == 3
        check_saving(model, plain, INPUTS)
        with pytest.raises(UserError, match=r"'lily' cannot be merged .*save them as"):
            check_merging(model, INPUTS)
        # The trial was one on a copy.
        assert model_partition(model).num_blocks == 3


class TestHeadOnAHalfBase:
    """The head is trained in full and in float32, on hidden states in bfloat16."""

    @pytest.mark.parametrize(
        ("family", "head", "tuning", "options"),
        rest_slow(
            [
                ("roberta", "SEQ_CLS", "lora", {}),
                ("roberta", "SEQ_CLS", "lora", {"init_lora_weights": "pissa"}),
                *((family, "SEQ_CLS", "lora", {}) for family in [*CONFIGS][::-1]),
                *(("roberta", head, "lora", {}) for head in [*HEADS][1:]),
                *(("roberta", "SEQ_CLS", t, {}) for t in ("ia3", "vera", "loha")),
            ],
            fast=3,
        ),
    )
    def test_is_tried_and_read_by_plain_peft(
        self, family, head, tuning, options, tmp_path
    ):
        model = adapt(plain(family, head), tuning, options, base="bf16")
        check_saving(model, lambda: plain(family, head), INPUTS)
        check_merging(model, INPUTS)
        moved(model)
        save_model(model, tmp_path)
        expected, largest = outputs(model), outputs(model).abs().max()
        assert expected.dtype == torch.float32
        beside = tmp_path / SAVED_BASE
        for dtype in (torch.float32, torch.bfloat16):
            base = plain(family, head)
            if beside.is_dir():
                base = type(base).from_pretrained(beside)
            read = peft.PeftModel.from_pretrained(base.to(dtype), tmp_path).eval()
            # Of half a mantissa's bits, three layers leave two decimal digits.
            assert (outputs(read).float() - expected).abs().max() < 0.05 * largest

    def test_a_tuner_that_reads_the_base_anew_is_refused_in_one_line(self):
        model = adapt(plain(), "psoft", {"r": 4}, base="bf16")
        with pytest.raises(UserError, match=r"'psoft' .*save it merged") as one:
            check_saving(model, plain, INPUTS)
        assert "\n" not in str(one.value)
        check_merging(model, INPUTS)

    def test_what_does_not_run_is_told_another_base(self):
        with pytest.raises(UserError, match=r"not run on it .*, or base='fp32'") as one:
            adapt(plain(), "lntuning", base="bf16")
        assert "\n" not in str(one.value)


def test_other_signs_are_as_good():
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    with _OtherSigns():
        left, values, right = torch.linalg.svd(matrix, full_matrices=True)
        one, sizes, other = torch.svd(matrix)
        roots, vectors = torch.linalg.eigh(matrix.T @ matrix)
        q, r = torch.linalg.qr(matrix)
        near = torch.svd_lowrank(matrix, q=3)
    assert not torch.equal(left, torch.linalg.svd(matrix, full_matrices=True).U)
    assert not torch.equal(vectors, torch.linalg.eigh(matrix.T @ matrix).eigenvectors)
    for again, whole in (
        (left[:, :3] * values @ right, matrix),
        (one * sizes @ other.T, matrix),
        (vectors * roots @ vectors.T, matrix.T @ matrix),
        (q @ r, matrix),
        (near[0] * near[1] @ near[2].T, matrix),
    ):
        torch.testing.assert_close(again, whole)


def test_a_copy_of_a_model_whose_base_was_changed_is_not_saved_wrongly(tmp_path):
    model = adapt(plain(), "lora", {"init_lora_weights": "pissa"})
    with pytest.raises(UserError, match=r"'pissa' changed the base .* adapt\(\)"):
        save_model(copy.deepcopy(model), tmp_path)


def test_merged_into_a_base_without_a_place_for_it():
    model = adapt(plain("llama"), "beft")
    with pytest.raises(UserError, match=r"'beft' cannot be merged .*no bias"):
        merge(model)


def test_merged_with_a_head_of_several_modules():
    # ... which peft itself merges for LoRA alone.
    for tuning in ("ia3", "lntuning", "oft"):
        model = moved(adapt(plain(), tuning, {"task_type": "SEQ_CLS"}))
        expected = outputs(model)
        merged = merge(model)
        assert isinstance(merged.classifier.dense, nn.Linear)
        torch.testing.assert_close(outputs(merged), expected, rtol=1e-5, atol=1e-5)
