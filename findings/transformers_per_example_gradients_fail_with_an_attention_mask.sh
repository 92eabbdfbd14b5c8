#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0: vmap(grad(...)) over examples, PyTorch's way to per-example
# gradients, works for a BERT classifier without an attention mask and raises with one, though
# the mask hides nothing.
# A good engineer expects the mask, a tensor with an entry per token, to be mapped like the ids:
# federated privacy, influence and noise-scale estimates take per-example gradients of padded
# batches.
# Seen: gradients of shape (4, 2, 32) without the mask; with it, RuntimeError from vmap about
# data-dependent control flow (the code that makes masks looks into their values).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import torch
import transformers
from torch.func import functional_call, grad, vmap

torch.manual_seed(0)
config = transformers.BertConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99
)
model = transformers.BertForSequenceClassification(config).eval()
values = dict(model.named_parameters())
ids, labels = torch.randint(1, 99, (4, 8)), torch.tensor([0, 1, 0, 1])


def loss(values, **example):
    return functional_call(model, values, (), {n: v[None] for n, v in example.items()}).loss


def of_each(**examples):
    gradients = vmap(lambda one: grad(loss)(values, **one))(examples)
    return tuple(gradients["classifier.weight"].shape)


bare = of_each(input_ids=ids, labels=labels)
try:
    masked = of_each(input_ids=ids, labels=labels, attention_mask=torch.ones_like(ids))
except RuntimeError as error:
    masked = str(error)
print(torch.__version__, transformers.__version__, bare, masked.splitlines()[0][:140], sep="\n")
assert bare == (4, 2, 32) and "data-dependent control flow" in masked
P
"$dir/venv/bin/python" -W ignore "$dir/try.py"
