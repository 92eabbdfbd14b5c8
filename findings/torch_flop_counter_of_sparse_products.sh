#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode counts a product with a sparse matrix as nothing forward, and
# backward as if the matrix were dense.
# A good engineer expects the same convention both ways: 2 operations for each stored value and
# column, or the dense number. But forward runs aten._sparse_addmm, for which there is no formula,
# and backward aten.mm, whose formula sees shapes only and takes the zeros, too.
# It matters where adapters hold sparse matrices (peft's FRoD): the counter then tells neither what
# a device computes nor what a dense adapter would.
# Seen, 300 of 128 x 128 values stored, 40 columns: forward 0 and backward 1310720 (24000 each by
# stored values); dense: 1310720 each.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$dir/count.py" <<'P'
import torch
from torch.utils.flop_counter import FlopCounterMode

SIZE, STORED, COLUMNS = 128, 300, 40
torch.manual_seed(0)
places = torch.randperm(SIZE * SIZE)[:STORED]
matrix = torch.sparse_coo_tensor(
    torch.stack([places // SIZE, places % SIZE]), torch.randn(STORED), (SIZE, SIZE)
).coalesce()


def flops(matrix):
    x = torch.randn(SIZE, COLUMNS, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = torch.sparse.mm(matrix, x) if matrix.is_sparse else matrix @ x
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


sparse, dense = flops(matrix), flops(matrix.to_dense())
print(f"forward, backward: sparse {sparse}, dense {dense}")
print(f"by stored values {2 * STORED * COLUMNS}, by all {2 * SIZE * SIZE * COLUMNS}")
assert dense == (2 * SIZE * SIZE * COLUMNS,) * 2
assert sparse == (0, dense[1])
P
"$dir/venv/bin/python" "$dir/count.py"
