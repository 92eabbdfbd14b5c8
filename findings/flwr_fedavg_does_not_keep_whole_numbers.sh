#!/usr/bin/env bash
# flwr 1.42.0, torch 2.13.0: the legacy FedAvg makes every integer array zero, the other one
# float64, of which a model then loads the floor.
# A good engineer expects the mean of six times 2 to be 2. With inplace=True, which is the
# default, aggregate_inplace casts the weight 1/6 to the array's int64, which is 0: after each
# round num_batches_tracked of every BatchNorm is 0. inplace=False says 2. Under the Message API
# six times 2 * 1/6 is 1.9999999999999998 of float64, and load_state_dict cuts it down to 1. With
# momentum=None that number is what running statistics are weighted by: the legacy strategy
# makes them those of the last batches of a round. Other integer buffers fare no better.
# Seen: int64 0 and float64 2.0 (legacy); float64 1.9999999999999998, loaded as 1.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet flwr==1.42.0 torch==2.13.0 numpy==2.4.6
export FLWR_TELEMETRY_ENABLED=0
cat > "$dir/mean.py" <<'P'
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.server.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from flwr.common import parameters_to_ndarrays

two = np.asarray(2)
replies = [(None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters([two]), 10, {}))] * 6
for inplace in (True, False):
    parameters, _ = FedAvg(inplace=inplace).aggregate_fit(2, replies, [])
    (mean,) = parameters_to_ndarrays(parameters)
    print(f"legacy, inplace={inplace}: {mean.dtype} {mean}")
name = "num_batches_tracked"
records = [
    RecordDict(
        {
            "arrays": ArrayRecord({name: Array(two)}),
            "metrics": MetricRecord({"num-examples": 10}),
        }
    )
    for _ in range(6)
]
mean = aggregate_arrayrecords(records, "num-examples")
norm = torch.nn.BatchNorm1d(1)
norm.load_state_dict(mean.to_torch_state_dict(), strict=False)
value = mean[name].numpy()
print(f"Message API: {value.dtype} {float(value)}, loaded as {norm.num_batches_tracked}")
P
"$dir/venv/bin/python" "$dir/mean.py" 2> /dev/null | tee "$dir/seen"
grep -q "inplace=True: int64 0" "$dir/seen" && grep -q "loaded as 1" "$dir/seen"
