#!/usr/bin/env bash
# torch 2.13.0: scaled_dot_product_attention on a CPU chooses its fused kernel for inputs that
# carry a tangent, too, for which that kernel has no formula, and raises.
# A good engineer expects the choice among its kernels to look at that, as it looks at shapes,
# types and masks: the plain kernel beside it has forward derivatives. So forward-mode
# fine-tuning of any current transformer fails until the kernel is chosen by hand.
# Seen: NotImplementedError that names the flash kernel for CPUs; a tangent, equal to the
# difference quotient, under sdpa_kernel(SDPBackend.MATH).
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention

torch.manual_seed(0)
x, way = torch.randn(2, 1, 2, 8, 16, dtype=torch.float64)


def tangent():
    with forward_ad.dual_level():
        moving = forward_ad.make_dual(x, way)
        return forward_ad.unpack_dual(attention(moving, moving, moving)).tangent


try:
    fused = tangent()
except NotImplementedError as error:
    fused = str(error).splitlines()[0]
with sdpa_kernel(SDPBackend.MATH):
    plain = tangent()
h = 1e-6
quotient = (attention(*[x + h * way] * 3) - attention(*[x - h * way] * 3)) / (2 * h)
print(torch.__version__, fused, (plain - quotient).abs().max().item(), sep="\n")
assert "flash_attention_for_cpu" in fused and torch.allclose(plain, quotient, atol=1e-6)
P
"$dir/venv/bin/python" "$dir/try.py"
