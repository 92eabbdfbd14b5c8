#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode counts no FLOP of fused attention on the CPU.
# A good engineer expects scaled_dot_product_attention to count what its two products count, as
# it does under the math backend, or to be told that an operator is not counted. The counter has
# formulas for CUDA's fused kernels and none for _scaled_dot_product_flash_attention_for_cpu, which
# is what every CPU runs by default, forward and backward.
# It matters where a device's computing time is planned from FLOPs that a CPU counted: the part
# that grows with the square of the sequence's length is missing.
# Seen: (forward, with backward) 0, 0 by default and 65536, 196608 under the math backend.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$dir/count.py" <<'P'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 16, 8


def flops(backends):
    q, k, v = torch.randn(3, BATCH, HEADS, LENGTH, WIDTH, requires_grad=True).unbind()
    with sdpa_kernel(backends), FlopCounterMode(display=False) as counter:
        out = scaled_dot_product_attention(q, k, v)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


fused = flops([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
plain = flops([SDPBackend.MATH])
by_hand = 2 * (2 * BATCH * HEADS * LENGTH * LENGTH * WIDTH)
print(f"fused {fused}, math backend {plain}, by hand {by_hand} forward")
assert fused == (0, 0)
assert plain == (by_hand, 3 * by_hand)
P
"$dir/venv/bin/python" "$dir/count.py"
