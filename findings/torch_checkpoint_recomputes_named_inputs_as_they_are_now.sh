#!/usr/bin/env bash
# torch 2.13.0: non-reentrant checkpointing recomputes with keyword arguments as they are at the
# time, so that one changed in place since gives a wrong gradient and no error.
# A good engineer expects autograd's usual error ("modified by an inplace operation"), which the
# same tensor gives as a positional argument, and without checkpointing the right gradient.
# Layers are called with keywords in most models, and some add to hidden states in place.
# Seen: positional, RuntimeError; by keyword, a gradient of 12 where 4 is right.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import torch
from torch.utils.checkpoint import checkpoint


def layer(x, weight):
    return (2 * x) * weight


def gradient(run):
    x, weight = torch.tensor([2.0]), torch.tensor([1.0], requires_grad=True)
    loss = run(x, weight).sum()
    x += 4
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return weight.grad.item()


plain = gradient(layer)
positional = gradient(lambda x, w: checkpoint(layer, x, w, use_reentrant=False))
by_keyword = gradient(lambda x, w: checkpoint(layer, x=x, weight=w, use_reentrant=False))
print(torch.__version__, plain, positional, by_keyword, sep="\n")
assert plain == 4 and "inplace operation" in positional and by_keyword == 12
P
"$dir/venv/bin/python" "$dir/try.py"
