"""What is saved after training, loaded in a process that knows nothing of it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from lola_flwr.model.adapters import adapt
from lola_flwr.model.loading import load_classifier
from lola_flwr.model.saved_adapters import keep_class_names, save_model
from tests.model.text_families import FAMILIES, save_tiny

PAIRS = [("a cat sleeps", "no cat sees"), ("every dog barks a bird", "a bird")]
TASKS = {"nli": ("entailment", "neutral", "contradiction"), "score": ()}
CASES = [
    *((family, "nli") for family in FAMILIES),
    *((family, "score") for family in ("Bert", "Roberta", "XLNet")),
]
# Nothing but transformers: what a user of the saved model has.
PROGRAM = """
import json, sys
import numpy, torch, transformers
from safetensors.numpy import save_file
transformers.logging.set_verbosity_error()
pairs, *directories = json.loads(sys.argv[1])
said, arrays = {}, {}
for directory in directories:
    pipe = transformers.pipeline("text-classification", model=directory)
    given = [{"text": first, "text_pair": second} for first, second in pairs]
    firsts, seconds = zip(*pairs)
    encoded = pipe.tokenizer(
        list(firsts), list(seconds), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = pipe.model(**encoded).logits
    arrays |= {f"{directory}:{name}": t.numpy() for name, t in encoded.items()}
    arrays[f"{directory}:logits"] = logits.numpy()
    said[directory] = {
        "predicted": pipe(given),
        "id2label": pipe.model.config.id2label,
        "label2id": pipe.model.config.label2id,
        "problem_type": pipe.model.config.problem_type,
        "max_length": pipe.tokenizer.model_max_length,
    }
save_file(arrays, sys.argv[2])
print(json.dumps(said))
"""


def train_and_save(directory, family, class_names):
    """Take a family's model, trained for something else, one step on; save it."""
    directory.mkdir()
    start = save_tiny(directory / "start", family, num_labels=2)
    model, tokenizer = load_classifier(
        start, num_labels=len(class_names) or 1, class_names=class_names
    )
    tokenizer.model_max_length = 24
    firsts, seconds = map(list, zip(*PAIRS, strict=True))
    batch = tokenizer(firsts, seconds, padding=True, return_tensors="pt")
    labels = torch.tensor([0, 2]) if class_names else torch.tensor([0.5, 4.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**batch, labels=labels).loss.backward()
    optimizer.step()
    save_model(model, directory / "model")
    tokenizer.save_pretrained(directory / "model")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    return {**{name: t.numpy() for name, t in batch.items()}, "logits": logits.numpy()}


def save_adapter(directory, own):
    """Save a LoRA adapter for a base whose classes have other names, or none."""
    names = {"id2label": own, "label2id": {name: i for i, name in own.items()}}
    base = save_tiny(directory / "base", "Bert", **names)
    model, tokenizer = load_classifier(base, num_labels=3, class_names=TASKS["nli"])
    adapted = adapt(model, "lora", {"r": 2, "init_lora_weights": False})
    save_model(adapted, directory / "adapter")
    tokenizer.save_pretrained(directory / "adapter")
    said = keep_class_names(adapted, directory / "adapter")
    with torch.no_grad():
        return said, adapted(**tokenizer(*PAIRS[0], return_tensors="pt")).logits


def test_adapters_are_not_called_by_the_classes_of_their_base(tmp_path):
    """Their base is a classifier of these classes in another order, by itself."""
    own = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    said, logits = save_adapter(tmp_path, own)
    directory = str(tmp_path / "adapter")
    assert "has other classes (CONTRADICTION, NEUTRAL, ENTAILMENT)" in said
    with pytest.raises((OSError, ValueError)):
        transformers.pipeline("text-classification", model=directory)
    # As it says.
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base",
        config=transformers.AutoConfig.from_pretrained(directory),
        ignore_mismatched_sizes=True,
    )
    loaded = peft.PeftModel.from_pretrained(base, directory).eval()
    assert loaded.config.id2label == dict(enumerate(TASKS["nli"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        again = loaded(**tokenizer(*PAIRS[0], return_tensors="pt")).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("own", [TASKS["nli"], ("LABEL_0", "LABEL_1", "LABEL_2")])
def test_adapters_whose_base_says_nothing_else_are_loaded_as_they_are(own, tmp_path):
    said, logits = save_adapter(tmp_path, dict(enumerate(own)))
    assert said == ""
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "adapter"))
    with torch.no_grad():
        again = pipe.model(**pipe.tokenizer(*PAIRS[0], return_tensors="pt")).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-6)
    assert pipe.model.config.id2label == dict(enumerate(own))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What each model gave when it was saved, and what the saved one gives."""
    root = tmp_path_factory.mktemp("saved")
    before = {
        (family, task): train_and_save(root / f"{family}-{task}", family, TASKS[task])
        for family, task in CASES
    }
    where = {case: str(root / "-".join(case) / "model") for case in CASES}
    asked, answer = json.dumps([PAIRS, *where.values()]), root / "arrays.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, asked, str(answer)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    arrays = load_file(answer)
    after = {
        case: {
            name.removeprefix(f"{directory}:"): array
            for name, array in arrays.items()
            if name.startswith(f"{directory}:")
        }
        for case, directory in where.items()
    }
    return before, after, {case: said[directory] for case, directory in where.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task"), CASES)
def test_the_saved_model_is_the_trained_one(saved, family, task):
    before, after, said = (found[family, task] for found in saved)
    assert before.keys() == after.keys(), "the inputs are those of the training"
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-6)
    assert said["max_length"] == 24
    names = TASKS[task] or ("LABEL_0",)
    assert said["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert said["label2id"] == {name: i for i, name in enumerate(names)}
    logits = before["logits"]
    if task == "score":
        assert said["problem_type"] == "regression"
        scores = [one["score"] for one in said["predicted"]]
        np.testing.assert_allclose(scores, logits[:, 0], rtol=0, atol=1e-5)
    else:
        assert said["problem_type"] == "single_label_classification"
        predicted = [one["label"] for one in said["predicted"]]
        assert predicted == [names[index] for index in logits.argmax(axis=1)]
