#!/usr/bin/env bash
# transformers 5.24.0: no DBRX model can be made from a DbrxConfig, its default one included.
# A good engineer expects DbrxForCausalLM(DbrxConfig()) to make a model of random weights, as of
# every other family: tests, cost estimates and memory plans are made so where there are no
# weights. The rotary embedding asks the attention's configuration for rope_theta, which that
# class does not have.
# Seen: AttributeError: 'DbrxAttentionConfig' object has no attribute 'rope_theta', for the default
# and for a small configuration.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import torch
import transformers
from transformers import DbrxConfig, DbrxForCausalLM

for config in (DbrxConfig(), DbrxConfig(d_model=16, n_heads=4, n_layers=2, vocab_size=30)):
    try:
        with torch.device("meta"):
            DbrxForCausalLM(config)
    except AttributeError as error:
        print(transformers.__version__, error)
        assert "rope_theta" in str(error)
    else:
        raise SystemExit("the model was made")
P
"$dir/venv/bin/python" "$dir/try.py"
