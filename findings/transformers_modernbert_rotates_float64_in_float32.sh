#!/usr/bin/env bash
# transformers 5.24.0: ModernBERT turns queries and keys by positions in float32, whatever their type.
# A good engineer expects a model in float64 to compute in float64, as Llama of the same version
# does: `apply_rotary_pos_emb` of ModernBERT rounds what it is given to float32, and returns it as
# float64 again.
# It matters where a model in double precision is the reference that other code is compared with
# (a divided or a rewritten layer): of ModernBERT it is right to 7 digits only, and says float64.
# Seen: turned by nothing (cosine 1, sine 0), queries of 1/3 come back 9.9e-09 off; Llama's as they were.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import torch
from transformers.models.llama import modeling_llama
from transformers.models.modernbert import modeling_modernbert

q = torch.full((1, 1, 2, 4), 1 / 3, dtype=torch.float64)
cos, sin = torch.ones(1, 2, 4, dtype=torch.float64), torch.zeros(1, 2, 4, dtype=torch.float64)
off = {}
for module in (modeling_llama, modeling_modernbert):
    turned, _ = module.apply_rotary_pos_emb(q, q, cos, sin)
    off[module] = float((turned - q).abs().max())
    print(module.__name__.rpartition("_")[2], turned.dtype, f"{off[module]:.1e} off")
    assert turned.dtype == torch.float64
assert off[modeling_llama] == 0.0
assert 1e-9 < off[modeling_modernbert] < 1e-7
P
"$dir/venv/bin/python" "$dir/try.py" 2> /dev/null
