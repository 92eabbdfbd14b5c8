#!/usr/bin/env bash
# flwr 1.42.0: `flwr run --stream` waits for the run and shows its log, and exits with 0 even if
# the run failed.
# A good engineer expects a command that follows a run to its end to tell by its exit code how it
# ended, so that a script, a CI job or `flwr run ... --stream && deploy` stops. It does not tell;
# the status has to be asked for with `flwr list --run-id ID --format json`.
# Seen: the ServerApp's RuntimeError in the streamed log, exit code 0, and then the status
# "finished:failed".
set -euo pipefail
dir=$(mktemp -d)
link=
trap 'kill $link 2>/dev/null || true; wait; rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet flwr==1.42.0 numpy==2.4.6
export PATH="$dir/venv/bin:$PATH" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_HOME="$dir/home"
mkdir -p "$dir/app/app" "$FLWR_HOME"
port=$(python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
cat > "$dir/app/pyproject.toml" <<'P'
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
serverapp = "app.parts:server"
clientapp = "app.parts:client"
P
touch "$dir/app/app/__init__.py"
cat > "$dir/app/app/parts.py" <<'P'
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
client = ClientApp()
server = ServerApp()

@server.main()
def main(grid, context):
    raise RuntimeError("the training diverged")
P
printf '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:%s"\ninsecure = true\n' \
  "$port" > "$FLWR_HOME/config.toml"
flower-superlink --insecure --port "$port" > "$dir/link.log" 2>&1 & link=$!
until python -c "import socket; socket.create_connection(('127.0.0.1', $port), 1)" 2>/dev/null; do sleep 0.5; done
code=0
timeout 120 flwr run "$dir/app" here --stream > "$dir/run.log" 2>&1 || code=$?
status=$(flwr list here --format json | grep -o 'finished:[a-z]*' | head -1)
grep -q "the training diverged" "$dir/run.log"
echo "exit code $code, status $status"
[ "$code" = 0 ] && [ "$status" = "finished:failed" ]
