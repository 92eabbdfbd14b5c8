#!/usr/bin/env bash
# peft 0.21.2, bitsandbytes 0.50.2: DoRA over an 8-bit layer on the CPU runs once and then fails.
# A good engineer expects a second forward pass to do what the first did, as LoRA over the same
# layer does. To take the weight's norm, DoRA replaces the layer's weight by a copy
# (weight.to("cpu")). By then bitsandbytes has moved the row scales from the weight to the layer's
# state; the copy, which has none, makes the next forward pass overwrite them with None.
# It matters where devices without a GPU fine-tune over a frozen 8-bit base: the adapter can be
# made and its first loss computed, and the run ends at its second step.
# Seen: LoRA runs twice; DoRA runs once, and then raises AttributeError: 'NoneType' object has no
# attribute 'unsqueeze' when training and 'dtype' under eval().
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet \
  torch==2.13.0 transformers==5.24.0 peft==0.21.2 bitsandbytes==0.50.2 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model

x = torch.randn(2, 32)


def runs(dora, training):
    base = torch.nn.Sequential()
    base.add_module("layer", bitsandbytes.nn.Linear8bitLt(32, 32, has_fp16_weights=False))
    config = LoraConfig(target_modules=["layer"], r=2, use_dora=dora)
    model = get_peft_model(base.to("cpu"), config).train(training)
    said = []
    for _ in range(2):
        try:
            said.append(tuple(model(x).shape))
        except AttributeError as error:
            said.append(str(error))
    print("DoRA" if dora else "LoRA", "train()" if training else "eval()", said)
    return said


for training in (True, False):
    assert runs(False, training) == [(2, 32), (2, 32)]
    once, twice = runs(True, training)
    assert once == (2, 32) and "'NoneType' object has no attribute" in twice
P
"$dir/venv/bin/python" "$dir/try.py" 2> /dev/null
