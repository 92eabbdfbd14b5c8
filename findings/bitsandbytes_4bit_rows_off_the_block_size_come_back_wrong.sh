#!/usr/bin/env bash
# bitsandbytes 0.50.2 (x86-64 with AVX-512): 4-bit weights come back wrong on the CPU where a row is
# no whole number of blocks.
# A good engineer expects dequantize_4bit to give back what quantize_4bit took, to within a step of
# the code, or an error for a shape it cannot do. Blocks are cut from the flattened weight, but
# the AVX-512 kernel finds a block's scale by row and column as if each row began a block. Linear4bit
# computes with these values. The other kernels are right, so one packed file is two models.
# It matters where servers and devices share one frozen 4-bit base: those with AVX-512 train
# adapters for another base, and nothing says so.
# Seen: 64 x 96 in blocks of 64 is off by 2.04, by hand from the same code and scales by 0.45;
# 64 x 128 is off by 0.45 in both; Linear4bit(96, 64) is off from the product by hand likewise.
set -euo pipefail
grep -q avx512f /proc/cpuinfo || { echo "not tried here: needs a processor with AVX-512"; exit 0; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit


def by_hand(packed, state):
    packed = packed.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).long()
    blocks = state.code[codes].reshape(-1, state.blocksize)
    return (blocks * state.absmax[:, None]).reshape(state.shape)


def off(width):
    torch.manual_seed(0)
    weight = torch.randn(64, width)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    library = (dequantize_4bit(packed, state) - weight).abs().max().item()
    hand = (by_hand(packed, state) - weight).abs().max().item()
    layer = Linear4bit(width, 64, bias=False, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict({"weight": weight})
    x = torch.eye(width)
    product = (layer.to("cpu")(x) - x @ by_hand(packed, state).T).abs().max().item()
    print(f"64 x {width}: off by {library:.2f}, by hand {hand:.2f}; Linear4bit by {product:.2g}")
    return library, hand, product


library, hand, product = off(96)
assert library > 1 > 0.6 > hand and product > 1
library, hand, product = off(128)
assert library < 0.6 and hand < 0.6 and product < 1e-5
P
"$dir/venv/bin/python" "$dir/try.py" 2> /dev/null
