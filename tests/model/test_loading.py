from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import nn

from lola_flwr.errors import UserError
from lola_flwr.model import loading as models
from lola_flwr.model import sources
from lola_flwr.model.loading import (
    fingerprint,
    load_classifier,
    load_values,
)
from lola_flwr.model.sources import ModelNotFound


@pytest.fixture
def directory(tmp_path):
    """A classifier of two labels with its tokenizer, saved."""
    model, tokenizer = load_classifier("random:roberta-tiny", num_labels=2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_model_whose_heads_were_pruned_by_transformers_4_is_refused_by_name(
    directory,
):
    """As 4.57.1 saves it; 5.24.0 makes all heads (findings/)."""
    file = directory / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    config = json.loads((directory / "config.json").read_text())
    size = config["hidden_size"] // config["num_attention_heads"]
    for name, values in weights.items():
        if ".layer.0.attention.self." in name:
            weights[name] = values[size:].contiguous()
        if name.endswith(".layer.0.attention.output.dense.weight"):
            weights[name] = values[:, size:].contiguous()
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelNotFound, match="Save model and configuration together"):
        load_classifier(str(directory), num_labels=2)
    config["pruned_heads"] = {"0": [0]}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFound, match="pruned_heads are left out by tran") as one:
        load_classifier(str(directory), num_labels=2)
    assert "\n" not in str(one.value)


def test_random_shape_is_a_function_of_the_seed():
    first, tokenizer = load_classifier("random:roberta-tiny", num_labels=3, seed=5)
    again, _ = load_classifier("random:roberta-tiny", num_labels=3, seed=5)
    other, _ = load_classifier("random:roberta-tiny", num_labels=3, seed=6)
    names = [name for name, _ in first.named_parameters()]
    assert fingerprint(first, names) == fingerprint(again, names)
    assert fingerprint(first, names) != fingerprint(other, names)
    logits = first(**tokenizer(["one", "two words"], padding=True, return_tensors="pt"))
    assert logits.logits.shape == (2, 3)


@pytest.mark.slow
def test_roberta_base_has_its_published_size():
    model, _ = load_classifier("random:roberta-base", num_labels=2)
    # 124.6 M parameters: 124 M of the encoder and 0.59 M of the head.
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(
        124.6e6, rel=0.01
    )


def test_sentence_pairs_suit_roberta(directory):
    for name in ("random:roberta-tiny", str(directory)):
        model, tokenizer = load_classifier(name, num_labels=2)
        encoded = tokenizer(
            ["a cat", "two dogs bark"],
            ["a feline", "silence"],
            padding=True,
            return_tensors="pt",
        )
        assert model(**encoded).logits.shape == (2, 2)


def test_the_callers_random_numbers_are_left_alone(directory):
    torch.manual_seed(3)
    expected = torch.rand(2)
    for name in ("random:roberta-tiny", str(directory)):
        torch.manual_seed(3)
        load_classifier(name, num_labels=3, seed=8)
        torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


class TestDirectory:
    def test_weights_are_loaded(self, directory):
        # Another seed: what is equal was loaded.
        loaded, _ = load_classifier(str(directory), num_labels=2, seed=9)
        saved, _ = load_classifier("random:roberta-tiny", num_labels=2)
        for name, values in saved.state_dict().items():
            torch.testing.assert_close(
                loaded.state_dict()[name], values, rtol=0, atol=0
            )

    def test_head_for_another_number_of_labels_is_new(self, directory):
        saved, _ = load_classifier(str(directory), num_labels=2)
        loaded, _ = load_classifier(str(directory), num_labels=3, seed=1)
        again, _ = load_classifier(str(directory), num_labels=3, seed=1)
        assert loaded.classifier.out_proj.weight.shape == (3, 32)
        names = [name for name, _ in loaded.named_parameters()]
        assert fingerprint(loaded, names) == fingerprint(again, names)
        base = [name for name in names if name.startswith("roberta.")]
        assert fingerprint(loaded, base) == fingerprint(saved, base)

    def test_base_of_another_shape_is_refused(self, directory):
        config = transformers.AutoConfig.from_pretrained(directory)
        config.vocab_size = 100
        config.save_pretrained(directory)
        with pytest.raises(
            ModelNotFound, match=r"word_embeddings\.weight has shape \(30522, 32\)"
        ):
            load_classifier(str(directory), num_labels=2)

    def test_without_a_model(self, tmp_path):
        with pytest.raises(ModelNotFound, match="cannot be loaded"):
            load_classifier(str(tmp_path), num_labels=2)

    def test_code_of_its_own_is_not_run_and_nobody_is_asked(
        self, directory, monkeypatch
    ):
        config = json.loads((directory / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "own.py").write_text("raise SystemExit('it was run')")
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        with pytest.raises(ModelNotFound, match="custom code") as raised:
            load_classifier(str(directory), num_labels=2)
        assert "\n" not in str(raised.value)

    def test_without_a_tokenizer(self, tmp_path, roberta):
        roberta.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"no vocabulary.*knows 5 tokens"):
            load_classifier(str(tmp_path), num_labels=2)

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("model.safetensors", b""),
            ("model.safetensors", b"no safetensors"),
            ("config.json", b"{"),
            ("config.json", b"[]"),
            ("tokenizer.json", b"{}"),
        ],
    )
    def test_damaged_file(self, directory, file, content):
        (directory / file).write_bytes(content)
        with pytest.raises(ModelNotFound, match="cannot be loaded") as raised:
            load_classifier(str(directory), num_labels=2)
        assert "\n" not in str(raised.value)

    @pytest.mark.slow
    def test_pickle_is_refused_and_the_conversion_works(self, directory):
        saved, _ = load_classifier(str(directory), num_labels=2)
        torch.save(saved.state_dict(), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
        with pytest.raises(ModelNotFound, match=r"pickle \(pytorch_model.bin\)") as no:
            load_classifier(str(directory), num_labels=2)
        program = str(no.value).partition('python -c "')[2].rstrip('"')
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        loaded, _ = load_classifier(str(directory), num_labels=2, seed=9)
        names = [name for name, _ in saved.named_parameters()]
        assert fingerprint(loaded, names) == fingerprint(saved, names)


def gpt2_directory(directory, **special_tokens):
    """Save a tiny GPT-2 with a tokenizer of its own."""
    words = {"<|end|>": 0, "<unk>": 1, "a": 2, "cat": 3, "sleeps": 4}
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(words, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **special_tokens
    ).save_pretrained(directory)
    config = transformers.GPT2Config(
        vocab_size=5,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(directory)
    return str(directory)


class TestPadToken:
    def test_end_token_pads_where_there_is_none(self, tmp_path):
        name = gpt2_directory(tmp_path, eos_token="<|end|>")
        model, tokenizer = load_classifier(name, num_labels=2)
        assert (tokenizer.pad_token, model.config.pad_token_id) == ("<|end|>", 0)
        encoded = tokenizer(["a cat sleeps", "a"], padding=True, return_tensors="pt")
        alone = tokenizer(["a"], return_tensors="pt")
        with torch.inference_mode():
            logits, one = model(**encoded).logits, model(**alone).logits
        torch.testing.assert_close(logits[1:], one)

    def test_neither_is_refused(self, tmp_path):
        name = gpt2_directory(tmp_path)
        with pytest.raises(UserError, match="neither a pad token"):
            load_classifier(name, num_labels=2)


def test_packaged_minilm():
    model, tokenizer = load_classifier("minilm-l6", num_labels=2, seed=1)
    assert model.config.num_hidden_layers == 6
    encoded = tokenizer(["a cat sleeps", "a kitten naps", "tax law"], padding=True,
                        return_tensors="pt")  # fmt: skip
    with torch.inference_mode():
        vectors = model.bert(**encoded).last_hidden_state[:, 0]
    near, far = (torch.cosine_similarity(vectors[0], vectors[i], 0) for i in (1, 2))
    assert near > far, "the weights are the trained ones"


def test_hub_that_cannot_be_reached_names_the_offline_choices(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelNotFound, match=r"model='org/absent'.*minilm-l6.*directory"
    ):
        load_classifier("org/absent", num_labels=2)


def test_unknown_random_shape():
    with pytest.raises(ModelNotFound, match="random:roberta-base, random:roberta-wide"):
        load_classifier("random:gpt", num_labels=2)


def test_changed_weights_in_the_package_are_noticed(monkeypatch):
    monkeypatch.setattr(models, "_OFFLINE_SHA256", "0" * 64)
    with pytest.raises(ModelNotFound, match="expected 0000"):
        load_classifier("minilm-l6", num_labels=2)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(sources, "_OFFLINE_PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFound, match=r"pip install .*\[offline\]"):
        load_classifier("minilm-l6", num_labels=2)


def test_verbosity_of_transformers_is_left_alone():
    before = transformers.utils.logging.get_verbosity()
    load_classifier("minilm-l6", num_labels=2)
    assert transformers.utils.logging.get_verbosity() == before


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.weight = nn.Parameter(torch.zeros(2, 3))


def test_fingerprint_of_a_parameter_without_dimensions():
    model, other = Scaled(), Scaled()
    other.scale.data.fill_(3.0)
    assert fingerprint(model, ["scale"]) == fingerprint(Scaled(), ["scale"])
    assert fingerprint(model, ["scale"]) != fingerprint(other, ["scale"])


class TestLoadValues:
    NAMES = ("weight", "scale")

    def test_copies_in_place(self, rng):
        model = Scaled()
        weight = model.weight
        values = [rng.standard_normal((2, 3)), np.array(5.0, dtype=np.float32)]
        load_values(model, self.NAMES, values)
        assert model.weight is weight
        assert weight.dtype == torch.float32
        np.testing.assert_allclose(weight.numpy(force=True), values[0], rtol=1e-6)
        assert model.scale.item() == 5.0
        values[0][:] = 0
        assert weight.detach().abs().max() > 0, "a copy, not a view"

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([np.zeros((2, 3))], r"1 arrays received; this model has 2 trainable"),
            (
                [np.zeros((2, 3)), np.zeros(1)],
                r"scale has shape \(\) here but \(1,\) at the server",
            ),
            ([np.zeros((2, 3)), np.array(1)], "scale received as int64; send float16"),
            ([np.zeros((2, 3)), np.array(1.0, dtype=">f4")], "received as >f4"),
        ],
    )
    def test_what_does_not_fit_changes_nothing(self, values, message):
        model = Scaled()
        values[0][:] = 7
        with pytest.raises(UserError, match=message):
            load_values(model, self.NAMES, values)
        assert model.weight.abs().max() == 0
        assert model.scale.item() == 2.0


def test_fingerprint_notices_a_change_in_the_same_model(roberta):
    names = [name for name, _ in roberta.named_parameters() if "embeddings" in name]
    before = fingerprint(roberta, names)
    assert fingerprint(roberta, names) == before
    with torch.no_grad():
        dict(roberta.named_parameters())[names[0]].add_(1)
    assert fingerprint(roberta, names) != before
