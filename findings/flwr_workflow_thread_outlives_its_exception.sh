#!/usr/bin/env bash
# flwr 1.42.0: the thread that DefaultWorkflow starts to follow the nodes goes on when a strategy
# raises, and asks the Grid for nodes every 5 s as long as the process lives.
# A good engineer expects a workflow that starts a thread to end it however it ends itself (it
# does so after the last round): a server that catches the error, or runs several workflows one
# after the other, as a search over settings does, gathers threads and their traffic.
# Seen: after the strategy's RuntimeError the thread _update_client_manager is alive, and within
# 11 s it has asked two times more.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet flwr==1.42.0 numpy==2.4.6
export FLWR_TELEMETRY_ENABLED=0 FLWR_HOME="$dir/home"
cat > "$dir/seen.py" <<'P'
import threading
import time

import numpy as np
from flwr.app import RecordDict
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow


class Grid:
    asked = 0

    def get_node_ids(self):
        self.asked += 1
        return []


class Strategy(FedAvg):
    def evaluate(self, server_round, parameters):
        raise RuntimeError("enough")


grid = Grid()
start = ndarrays_to_parameters([np.zeros(1)])
context = LegacyContext(
    Context(1, 1, {}, RecordDict(), {}),
    config=ServerConfig(num_rounds=1),
    strategy=Strategy(initial_parameters=start),
)
try:
    DefaultWorkflow()(grid, context)
except RuntimeError as error:
    print("raised:", error)
before = grid.asked
time.sleep(11)
alive = [t.name for t in threading.enumerate() if "_update_client_manager" in t.name]
print(f"alive: {alive}, asked since: {grid.asked - before}")
P
"$dir/venv/bin/python" "$dir/seen.py" 2>/dev/null | tee "$dir/out"
grep -q "alive: \['Thread-1 (_update_client_manager)'\], asked since: 2" "$dir/out"
