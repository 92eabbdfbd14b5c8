#!/usr/bin/env bash
# flwr 1.42.0: an ArrayRecord made from a dict holds other Array objects than those it is given.
# A good engineer expects what dict(arrays) does: the same objects under the same names, as
# record[name] = array keeps them. Made from a dict, every Array is copied, and an Array remembers
# the id that its bytes are hashed to: a server that makes one Array for all its devices and puts it
# into a record each has all bytes hashed anew for every device.
# Seen: the record of a dict holds a copy, that of an assignment the object itself; of one array for
# four devices' records there are four objects to hash, and one where it is assigned.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet flwr==1.42.0 numpy==2.4.6
cat > "$dir/try.py" <<'P'
import numpy as np
from flwr.app import Array, ArrayRecord

array = Array(np.ones(4, np.float32))


def assigned():
    record = ArrayRecord()
    record["w"] = array
    return record


for name, make in (("of a dict", lambda: ArrayRecord({"w": array})), ("assigned", assigned)):
    records = [make() for _ in range(4)]
    objects = {id(record["w"]) for record in records}
    same = records[0]["w"] is array
    print(f"{name}: the same object: {same}; objects of four records: {len(objects)}")
    assert (same, len(objects)) == ((False, 4) if name == "of a dict" else (True, 1))
P
FLWR_TELEMETRY_ENABLED=0 "$dir/venv/bin/python" "$dir/try.py"
