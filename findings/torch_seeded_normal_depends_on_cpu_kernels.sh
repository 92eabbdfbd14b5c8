#!/usr/bin/env bash
# torch 2.13.0 (x86-64): the same seed gives other weights under other CPU kernels.
# A good engineer expects torch.manual_seed to fix normal_() on one device type. The CPU
# fills 16 numbers and more with vectorised code, whose logarithm and cosine differ in the last
# bits from the plain kernels that a machine without AVX2 runs. rand() is the same.
# It matters in a federation where every device draws the frozen base from a seed and the
# server compares digests: machines with and without AVX2 disagree about the base.
# Seen: normal_ of 64 numbers differs in some last bits between ATEN_CPU_CAPABILITY=default and
# avx2; normal_ of 8 numbers and rand of 64 do not.
set -euo pipefail
grep -q avx2 /proc/cpuinfo || { echo "needs an x86-64 processor with AVX2"; exit 1; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$dir/draw.py" <<'P'
import hashlib, torch
def digest(draw, count):
    torch.manual_seed(0)
    return hashlib.sha256(draw(count).numpy().tobytes()).hexdigest()[:12]
normal = lambda count: torch.empty(count).normal_()
print(digest(normal, 64), digest(normal, 8), digest(torch.rand, 64))
P
read -r wide few uniform < <(ATEN_CPU_CAPABILITY=default "$dir/venv/bin/python" "$dir/draw.py")
read -r wide2 few2 uniform2 < <(ATEN_CPU_CAPABILITY=avx2 "$dir/venv/bin/python" "$dir/draw.py")
echo "normal_ of 64: default $wide, avx2 $wide2"
echo "normal_ of 8:  default $few, avx2 $few2"
echo "rand of 64:    default $uniform, avx2 $uniform2"
[ "$wide" != "$wide2" ] && [ "$few" = "$few2" ] && [ "$uniform" = "$uniform2" ]
