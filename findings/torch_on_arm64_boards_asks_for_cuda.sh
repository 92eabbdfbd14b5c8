#!/usr/bin/env bash
# torch 2.11.0 to 2.13.0: on 64-bit ARM Linux it depends on CUDA's libraries, 2.10.0 on none.
# A good engineer expects `pip install torch` on a Raspberry Pi to bring what a CPU needs, as it
# did up to 2.10.0, whose CUDA dependencies were for x86-64 alone. Since then they are for all of
# Linux: gigabytes for a board without such a GPU, whose card they may not fit on.
# Seen: packages of CUDA among what is resolved for aarch64: 0 with 2.10.0, 18 with the others.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9
for version in 2.10.0 2.11.0 2.13.0; do
    echo "torch==$version" > "$dir/in"
    "$dir/venv/bin/uv" pip compile --quiet --python-version 3.11 \
        --python-platform aarch64-manylinux_2_28 "$dir/in" > "$dir/resolved"
    echo "$version $(grep -cE '^(nvidia|cuda)' "$dir/resolved" || true)"
done | tee "$dir/out"
grep -qx "2.10.0 0" "$dir/out"
for version in 2.11.0 2.13.0; do
    [ "$(sed -n "s/^$version //p" "$dir/out")" -gt 10 ]
done
