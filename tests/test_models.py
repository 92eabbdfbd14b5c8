from __future__ import annotations

import pytest
import torch
import transformers

from lola_flwr import models
from lola_flwr.models import ModelNotFound, fingerprint, load_classifier


def test_random_shape_is_a_function_of_the_seed():
    first, tokenizer = load_classifier("random:roberta-tiny", num_labels=3, seed=5)
    again, _ = load_classifier("random:roberta-tiny", num_labels=3, seed=5)
    other, _ = load_classifier("random:roberta-tiny", num_labels=3, seed=6)
    names = [name for name, _ in first.named_parameters()]
    assert fingerprint(first, names) == fingerprint(again, names)
    assert fingerprint(first, names) != fingerprint(other, names)
    logits = first(**tokenizer(["one", "two words"], padding=True, return_tensors="pt"))
    assert logits.logits.shape == (2, 3)


def test_roberta_base_has_its_published_size():
    model, _ = load_classifier("random:roberta-base", num_labels=2)
    # 124.6 M parameters: 124 M of the encoder and 0.59 M of the head.
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(
        124.6e6, rel=0.01
    )


def test_local_directory(tmp_path, roberta):
    _, tokenizer = load_classifier("random:roberta-tiny", num_labels=2)
    roberta.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_classifier(str(tmp_path), num_labels=2)
    for name, values in roberta.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], values, rtol=0, atol=0)


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


def test_directory_without_a_model(tmp_path):
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        load_classifier(str(tmp_path), num_labels=2)


def test_unknown_random_shape():
    with pytest.raises(ModelNotFound, match="random:roberta-base, random:roberta-tiny"):
        load_classifier("random:gpt", num_labels=2)


def test_changed_weights_in_the_package_are_noticed(monkeypatch):
    monkeypatch.setattr(models, "_OFFLINE_SHA256", "0" * 64)
    with pytest.raises(ModelNotFound, match="expected 0000"):
        load_classifier("minilm-l6", num_labels=2)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(models, "_OFFLINE_PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFound, match=r"lola-flwr\[offline\]"):
        load_classifier("minilm-l6", num_labels=2)


def test_verbosity_of_transformers_is_left_alone():
    before = transformers.utils.logging.get_verbosity()
    load_classifier("minilm-l6", num_labels=2)
    assert transformers.utils.logging.get_verbosity() == before
