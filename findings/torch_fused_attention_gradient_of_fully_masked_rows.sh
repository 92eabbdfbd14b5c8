#!/usr/bin/env bash
# torch 2.13.0: the gradient of fused attention on the CPU is too large where a row is masked by
# finfo.min alone.
# A good engineer expects scaled_dot_product_attention to have the gradient of what it returns:
# forward it gives such a row the mean of all values, as softmax does, and backward it takes each
# key for the only one, since the row's logsumexp is rounded to finfo.min: as many times too large
# as there are keys. The math backend is right, and so is a boolean mask.
# It matters where padding is in front: transformers' eager masks are such, and a row's first
# token of its own is predicted from the last of the padding.
# Seen: outputs alike; the value's gradient 10.0 times that of the math backend, for 10 keys.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$dir/masked.py" <<'P'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KEYS = 10
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, KEYS, 8, requires_grad=True).unbind()
mask = torch.full((1, 1, KEYS, KEYS), torch.finfo(torch.float32).min)


def output_and_slope(backends):
    with sdpa_kernel(backends):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out, torch.autograd.grad(out.sum(), v)[0]


fused, fused_slope = output_and_slope([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
plain, plain_slope = output_and_slope([SDPBackend.MATH])
ratio = (fused_slope / plain_slope).mean().item()
print(f"outputs alike: {torch.allclose(fused, plain, atol=1e-6)}, gradients: {ratio:g} times")
assert torch.allclose(fused, plain, atol=1e-6)
assert abs(ratio - KEYS) < 1e-3
P
"$dir/venv/bin/python" "$dir/masked.py"
