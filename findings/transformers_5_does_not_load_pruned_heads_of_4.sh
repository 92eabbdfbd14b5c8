#!/usr/bin/env bash
# transformers 5.24.0 beside 4.57.1: a model of which heads were pruned (prune_heads) and which
# 4.57.1 has saved is not loaded by 5.24.0. Its config.json says which heads went
# (pruned_heads), and 4.57.1 loads it by that; 5.24.0 has no prune_heads, makes all heads, and
# finds that the weights have other sizes. A good engineer expects a saved classifier of a
# well-known family to load: devices that run pruned encoders have such directories.
# Seen: 4.57.1 loads it with the same logits; 5.24.0: RuntimeError, after a table in which all
# matrices of attention are "MISMATCH".
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat > "$dir/save.py" <<'P'
import sys
import torch
from transformers import BertConfig, BertForSequenceClassification

torch.manual_seed(0)
model = BertForSequenceClassification(BertConfig(
    hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64,
    vocab_size=50,
)).eval()
model.prune_heads({0: [1], 1: [0, 2]})
model.save_pretrained(sys.argv[1])
ids = torch.arange(10)[None]
again = BertForSequenceClassification.from_pretrained(sys.argv[1]).eval()
assert torch.equal(model(ids).logits, again(ids).logits)
P
cat > "$dir/load.py" <<'P'
import json
import sys
import transformers
from transformers import BertForSequenceClassification

said = json.load(open(sys.argv[1] + "/config.json"))["pruned_heads"]
assert said == {"0": [1], "1": [0, 2]}, said
assert not hasattr(BertForSequenceClassification, "prune_heads")
try:
    BertForSequenceClassification.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print(transformers.__version__, "RuntimeError:", str(error).splitlines()[0])
else:
    raise SystemExit("it was loaded")
P
for version in 4.57.1 5.24.0; do
  python3 -m venv "$dir/$version"
  "$dir/$version/bin/pip" install --quiet torch==2.13.0 "transformers==$version" numpy==2.4.6
done
"$dir/4.57.1/bin/python" "$dir/save.py" "$dir/model"
"$dir/5.24.0/bin/python" "$dir/load.py" "$dir/model"
