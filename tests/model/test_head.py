"""The task's classes, whatever a loaded model was trained for."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lola_flwr.errors import UserError
from lola_flwr.model.loading import load_classifier
from tests.marks import rest_slow
from tests.model.text_families import FAMILIES, save_tiny, tiny_tokenizer

NLI = ("entailment", "neutral", "contradiction")
# The order of roberta-large-mnli, and spelled as there.
MNLI_HUB = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
SENTENCES = (["a cat sleeps", "every dog barks"], ["no cat sees", "a bird"])


def named(names):
    return {"id2label": names, "label2id": {n: i for i, n in names.items()}}


def logits_of(model, tokenizer):
    encoded = tokenizer(*SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**encoded).logits


def load_nli(directory, class_names=NLI, **options):
    return load_classifier(
        str(directory), num_labels=len(class_names), class_names=class_names, **options
    )


def stored(directory):
    return AutoModelForSequenceClassification.from_pretrained(directory).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_in_another_order_are_matched_by_name(family, tmp_path, caplog):
    save_tiny(tmp_path, family, **named(MNLI_HUB))
    model, tokenizer = load_nli(tmp_path)
    own = stored(tmp_path)
    own.config.pad_token_id = tokenizer.pad_token_id
    torch.testing.assert_close(
        logits_of(model, tokenizer),
        logits_of(own, tokenizer)[:, [2, 1, 0]],
        rtol=0,
        atol=1e-6,
    )
    assert model.config.id2label == dict(enumerate(NLI))
    assert model.config.label2id == {name: i for i, name in enumerate(NLI)}
    assert model.config.problem_type == "single_label_classification"
    assert not caplog.records


@pytest.mark.parametrize(
    "names",
    [
        {0: "Entailment", 1: "neutral", 2: "contradiction"},
        {0: "not-entailment", 1: "ENTAILMENT"},
    ],
    ids=["case", "hyphen"],
)
def test_names_match_in_any_spelling(names, tmp_path, caplog):
    save_tiny(tmp_path, "Bert", **named(names))
    wanted = NLI if len(names) == 3 else ("entailment", "not_entailment")
    model, tokenizer = load_nli(tmp_path, wanted)
    own = stored(tmp_path)
    order = [0, 1, 2] if len(names) == 3 else [1, 0]
    expected = logits_of(own, tokenizer)[:, order]
    torch.testing.assert_close(logits_of(model, tokenizer), expected)
    assert not caplog.records


OTHER = {0: "negative", 1: "neutral", 2: "positive"}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        *((family, OTHER) for family in FAMILIES),
        ("Bert", {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}),
        ("Bert", {0: "neutral", 1: "Neutral", 2: "entailment"}),
    ],
)
def test_a_head_of_other_classes_starts_anew(family, names, tmp_path, caplog):
    save_tiny(tmp_path, family, **named(names))
    own = stored(tmp_path)
    with caplog.at_level(logging.WARNING):
        model, _ = load_nli(tmp_path, seed=1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("the head's last layer starts anew")
    assert ", ".join(names.values()) in line
    assert "entailment, neutral, contradiction" in line
    again, other = (load_nli(tmp_path, seed=seed)[0] for seed in (1, 2))
    changed = set()
    for name, values in model.named_parameters():
        assert torch.equal(values, again.get_parameter(name))
        if not torch.equal(values, own.get_parameter(name)):
            changed.add(name)
            assert not torch.equal(values, other.get_parameter(name))
            # As the family draws them, not as PyTorch does.
            assert 0 < values.abs().max() < 0.1
    assert len(changed) == 1
    assert len(model.get_parameter(*changed)) == 3
    assert model.config.id2label == dict(enumerate(NLI))


def test_without_names_of_the_task_named_classes_are_refused(tmp_path, caplog):
    save_tiny(tmp_path, "Roberta", **named(MNLI_HUB))
    with pytest.raises(UserError, match="0 CONTRADICTION, 1 NEUTRAL, 2 ENTAILMENT"):
        load_classifier(str(tmp_path), num_labels=3)
    model, _ = load_classifier(
        str(tmp_path), num_labels=3, class_names=list(MNLI_HUB.values())
    )
    assert model.config.id2label == MNLI_HUB
    save_tiny(tmp_path, "Roberta", num_labels=3)
    load_classifier(str(tmp_path), num_labels=3)
    assert not caplog.records, "numbers are the task's"


def test_a_base_without_a_head_is_nothing_to_speak_of(tmp_path, caplog):
    model = load_classifier("random:roberta-tiny", num_labels=2)[0].roberta
    model.save_pretrained(tmp_path)
    load_classifier("random:roberta-tiny", num_labels=2)[1].save_pretrained(tmp_path)
    loaded, _ = load_nli(tmp_path)
    assert loaded.config.id2label == dict(enumerate(NLI))
    assert not caplog.records


LABELS = {1: torch.tensor([0.5, 4.0]), 2: torch.tensor([0, 1]), 3: torch.tensor([2, 1])}


@pytest.mark.parametrize(
    "family", rest_slow(["Roberta", "DistilBert", "XLNet", "GPT2"], 2)
)
@pytest.mark.parametrize(
    ("first", "problem_type", "second"),
    [
        (1, None, 2),
        (1, "regression", 2),
        (1, "regression", 3),
        (2, "regression", 2),
        (2, "single_label_classification", 1),
        (3, "multi_label_classification", 3),
        (3, "multi_label_classification", 1),
    ],
)
def test_the_task_decides_the_loss(family, first, problem_type, second, tmp_path):
    save_tiny(tmp_path, family, num_labels=first, problem_type=problem_type)
    model, tokenizer = load_classifier(str(tmp_path), num_labels=second)
    kind = "regression" if second == 1 else "single_label_classification"
    assert model.config.problem_type == kind, "before it sees a label"
    encoded = tokenizer(*SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**encoded, labels=LABELS[second])
    if second == 1:
        expected = (output.logits[:, 0] - LABELS[1]).square().mean()
    else:
        expected = torch.nn.functional.cross_entropy(output.logits, LABELS[second])
    torch.testing.assert_close(output.loss, expected)
    assert model.config.num_labels == second


def test_a_regression_keeps_the_one_output_that_it_has(tmp_path, caplog):
    save_tiny(tmp_path, "Bert", num_labels=1)
    first, second = (
        load_classifier(str(tmp_path), num_labels=1, seed=seed)[0] for seed in (0, 1)
    )
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not caplog.records


def test_another_number_of_classes_is_told(tmp_path, caplog):
    save_tiny(tmp_path, "Bert", **named({0: "negative", 1: "positive"}))
    load_nli(tmp_path)
    (record,) = caplog.records
    assert "another number of classes (negative, positive)" in record.getMessage()


def test_what_else_speaks_of_the_earlier_task_goes(tmp_path):
    said = {"finetuning_task": "mnli", "function_to_apply": "sigmoid"}
    save_tiny(tmp_path, "Bert", **said, **named(MNLI_HUB))
    model, _ = load_nli(tmp_path)
    assert all(getattr(model.config, key, None) is None for key in said)


@pytest.mark.parametrize("names", [("yes",), ("yes", "YES"), ("yes", "no", "perhaps")])
def test_names_are_as_many_as_classes(names):
    with pytest.raises(UserError, match="must be 2 different names"):
        load_classifier("random:roberta-tiny", num_labels=2, class_names=names)


def test_the_tokenizer_numbers_the_sentences_of_a_pair():
    """Or the tests above would not notice a family that cannot take it."""
    assert 1 in tiny_tokenizer()("a cat", "a dog")["token_type_ids"]
