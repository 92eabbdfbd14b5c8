#!/usr/bin/env bash
# flwr 1.42.0: the arrays of a NumPyClient's reply have no shape and no type in its message.
# A good engineer expects what a mod or a strategy reads off an Array (its shape, its dtype) to be
# that of the array, as it is where a client of the Message API makes it. Where Flower puts a
# FitRes into a RecordDict, every Array says shape () and dtype "", and only the bytes tell.
# It matters to whoever checks or counts replies before they are decoded: a size from the record is
# 1 element, and a check of shapes refuses every honest reply of a NumPyClient.
# Seen: an array of shape (3, 4) and type float32 is announced as () and ''; its .numpy() is whole.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet flwr==1.42.0 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import numpy as np
from flwr.app import Array
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.compat.common.recorddict_compat import fitres_to_recorddict

values = np.ones((3, 4), np.float32)
direct = Array(values)
result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([values]), 1, {})
record = fitres_to_recorddict(result, keep_input=True)
(arrays,) = record.array_records.values()
(legacy,) = arrays.values()
for name, array in (("Message API", direct), ("FitRes", legacy)):
    print(f"{name}: shape {array.shape}, dtype {array.dtype!r}, holds {array.numpy().shape}")
assert tuple(direct.shape) == (3, 4) and direct.dtype == "float32"
assert tuple(legacy.shape) == () and legacy.dtype == ""
assert legacy.numpy().shape == (3, 4)
P
FLWR_TELEMETRY_ENABLED=0 "$dir/venv/bin/python" "$dir/try.py"
