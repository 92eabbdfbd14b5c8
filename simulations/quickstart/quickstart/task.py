"""What is trained, on what: the only file to change for a task of your own."""

from functools import lru_cache
from itertools import product

import datasets
import torch

from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import Batch
from lola_flwr.model.loading import load_classifier

# The last two of each are held out: what they mean, the model has to know.
GOOD = ("great", "lovely", "clever", "moving", "funny", "fresh", "superb", "warm")
BAD = ("awful", "boring", "clumsy", "cold", "silly", "stale", "terrible", "weak")
THINGS = ("plot", "music", "acting", "ending", "script", "pace", "cast")


@lru_cache
def load_data(path: str) -> datasets.DatasetDict:
    """Read a file with the columns text and label, and hold a fifth of it out."""
    if not path:
        return datasets.DatasetDict(train=reviews(0, 6), test=reviews(6, 8))
    kind = "json" if path.endswith(("json", "jsonl")) else "csv"
    options = {"delimiter": "\t"} if path.endswith("tsv") else {}
    examples = datasets.load_dataset(kind, data_files=path, split="train", **options)
    check_examples(examples, path)
    return examples.class_encode_column("label").train_test_split(0.2, seed=0)


def check_examples(examples: datasets.Dataset, path: str) -> None:
    """Refuse a file that nothing can be learned from."""
    if missing := {"text", "label"} - set(examples.column_names):
        raise UserError(
            f"data={path!r} has no column {' and '.join(sorted(missing))} (it has "
            f"{', '.join(examples.column_names)}); name them text and label: a .tsv or "
            ".csv in its first line, a .jsonl in every line."
        )
    for column in ("text", "label"):
        empty = [i for i, x in enumerate(examples[column], 1) if x in (None, "")]
        if empty:
            raise UserError(
                f"data={path!r} has no {column} in {len(empty)} of {len(examples)} "
                f"examples, the first of them number {empty[0]}; fill it in, or leave "
                "them out."
            )
    if len(classes := set(examples["label"])) < 2:
        raise UserError(
            f"data={path!r} has one label, {classes.pop()!r}; give examples of two "
            "classes or more."
        )


def reviews(start: int, stop: int) -> datasets.Dataset:
    """Make sentences of some of the words."""
    rows = [
        {"text": f"The {a} was {x}, and the {b} was {y}.", "label": label}
        for label, words in enumerate((BAD[start:stop], GOOD[start:stop]))
        for a, b, x, y in product(THINGS, THINGS, words, words)
        if a != b and x != y
    ]
    return datasets.Dataset.from_list(rows).class_encode_column("label").shuffle(0)


@lru_cache
def load_model(name: str, path: str):
    """Return the model with its adapters, their blocks, and the tokenizer."""
    labels = load_data(path)["train"].features["label"].names
    model, tokenizer = load_classifier(name, num_labels=len(labels), class_names=labels)
    model = adapt(model, "lora", {"r": 8, "target_modules": "all-linear"})
    return model, model_partition(model), tokenizer


def make_batch(rows: dict, tokenizer) -> Batch:
    """Tokenize some rows into what the model is called with."""
    encoded = tokenizer(
        rows["text"], truncation=True, max_length=64, padding=True, return_tensors="pt"
    )
    return {**encoded, "labels": torch.tensor(rows["label"])}
