#!/usr/bin/env bash
# flwr 1.42.0: a SuperLink gives nobody the reply of a SuperNode that has ended since.
# A good engineer expects a reply that was sent, and that the SuperLink has in full, to be handed
# out, and SIGTERM after "Sent successfully" to lose nothing. The SuperLink looks first whether
# the node is still there, and makes up an error in place of the reply if it is not. Flower's own
# Grid looks for replies every 3 s, so whoever ends a device within 3 s of its reply (a unit
# that is restarted, an upgrade) loses that device's work of the round.
# Seen: "Sent successfully" in the SuperNode's log, SIGTERM, and then the server got error 5,
# "Error: Node Unavailable".
set -euo pipefail
dir=$(mktemp -d)
link= node=
trap 'kill $node $link 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet flwr==1.42.0 numpy==2.4.6
export PATH="$dir/venv/bin:$PATH" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
mkdir -p "$dir/app/app" "$dir/link" "$dir/node"
port=$(python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
own=$(python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
cat > "$dir/app/pyproject.toml" <<P
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "app"
version = "1.0.0"
dependencies = []
[tool.flwr.app]
publisher = "someone"
[tool.flwr.app.components]
serverapp = "app.server:app"
clientapp = "app.client:app"
[tool.flwr.app.config]
directory = "$dir"
P
touch "$dir/app/app/__init__.py"
cat > "$dir/app/app/client.py" <<'P'
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def train(message, context):
    return Message(RecordDict({"metrics": MetricRecord({"loss": 0.5})}), reply_to=message)
P
cat > "$dir/app/app/server.py" <<'P'
import time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    directory = Path(context.run_config["directory"])
    while not list(grid.get_node_ids()):
        time.sleep(0.1)
    (node,) = grid.get_node_ids()
    content = RecordDict({"config": ConfigRecord({"lr": 0.1})})
    (asked,) = grid.push_messages([Message(content, dst_node_id=node, message_type="train")])
    while not (directory / "the-node-has-ended").exists():
        time.sleep(0.1)
    (reply,) = grid.pull_messages([asked])
    said = f"{reply.error.code} {reply.error.reason}" if reply.has_error() else "the reply"
    (directory / "got").write_text(said)
P
printf '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:%s"\ninsecure = true\n' \
  "$port" > "$dir/link/config.toml"
FLWR_HOME="$dir/link" flower-superlink --insecure --port "$port" > "$dir/link.log" 2>&1 & link=$!
until python -c "import socket; socket.create_connection(('127.0.0.1', $port), 1)" 2>/dev/null; do sleep 0.5; done
FLWR_HOME="$dir/node" flower-supernode --insecure --superlink "127.0.0.1:$port" --port "$own" \
  > "$dir/node.log" 2>&1 & node=$!
FLWR_HOME="$dir/link" flwr run "$dir/app" here > "$dir/run.log" 2>&1
timeout 120 bash -c "until grep -q 'Sent successfully' '$dir/node.log'; do sleep 0.1; done"
kill -TERM $node; wait $node || true; node=
touch "$dir/the-node-has-ended"
timeout 60 bash -c "until [ -s '$dir/got' ]; do sleep 0.1; done"
echo "the server got: $(cat "$dir/got")"
grep -q "^5 Error: Node Unavailable" "$dir/got"
