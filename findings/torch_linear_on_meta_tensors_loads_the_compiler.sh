#!/usr/bin/env bash
# torch 2.13.0: the first linear layer that runs on meta tensors loads torch._dynamo and sympy.
# A good engineer runs a model on meta tensors to learn shapes and costs without its memory, and
# expects that to be the cheap way. What stands in for the product there is decorated against
# compilation, and the decoration imports the compiler at its first call: hundreds of modules.
# Seen: 'linear: True', over 400 modules of sympy, 66 MiB more, in a process that compiles nothing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$dir/seen.py" <<'P'
import resource
import sys

import torch

with torch.device("meta"):
    layer, inputs = torch.nn.Linear(4, 4), torch.zeros(2, 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("before:", "torch._dynamo" in sys.modules)
assert layer(inputs).shape == (2, 4)
print("linear:", "torch._dynamo" in sys.modules)
print("sympy:", sum(name.startswith("sympy") for name in sys.modules))
print("MiB:", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
P
"$dir/venv/bin/python" "$dir/seen.py" 2>/dev/null | tee "$dir/out"
grep -q "before: False" "$dir/out"
grep -q "linear: True" "$dir/out"
[ "$(sed -n 's/sympy: //p' "$dir/out")" -gt 100 ]
[ "$(sed -n 's/MiB: //p' "$dir/out")" -gt 30 ]
