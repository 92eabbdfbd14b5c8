#!/usr/bin/env bash
# flwr-datasets 0.6.1: importing a partitioner loads seaborn and matplotlib.
# A good engineer expects `from flwr_datasets.partitioner import IidPartitioner`, which a device
# does to find its part of the data, to load what cuts data. The package's __init__ imports its
# visualization, too, and that imports seaborn, which imports matplotlib: on small devices, and in
# every process of a simulation, that is memory and a second for figures that nobody draws.
# Seen: both in sys.modules after the import, and neither before it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet flwr-datasets==0.6.1 numpy==2.4.6
cat > "$dir/seen.py" <<'P'
import sys

from datasets import Dataset
before = {"seaborn", "matplotlib"} & set(sys.modules)
from flwr_datasets.partitioner import IidPartitioner
partitioner = IidPartitioner(2)
partitioner.dataset = Dataset.from_dict({"x": [1, 2, 3, 4]})
print("before:", sorted(before), "part:", list(partitioner.load_partition(1)["x"]))
print("loaded:", *sorted({"seaborn", "matplotlib"} & set(sys.modules)))
P
"$dir/venv/bin/python" "$dir/seen.py" 2>/dev/null | tee "$dir/out"
grep -q "before: \[\] part: \[3, 4\]" "$dir/out"
grep -q "loaded: matplotlib seaborn" "$dir/out"
