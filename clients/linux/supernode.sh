#!/bin/sh
# Start this device's SuperNode with what /etc/lola-flwr/device.env says. systemd runs
# this; by hand: LOLA_ENV=device.env supernode.sh
set -eu

env_file=${LOLA_ENV:-/etc/lola-flwr/device.env}
# shellcheck source=/dev/null
. "$env_file"

# Chunks that get through in time, by the rate that the profile states.
chunk=$("$LOLA_PYTHON" - "$LOLA_PROFILE" <<'PYTHON'
import sys
from pathlib import Path

from lola_flwr.deployment.measurement import read_profile
from lola_flwr.deployment.pacing import chunk_bytes

print(chunk_bytes(read_profile(Path(sys.argv[1])).get("uplink-bps", 1e6)))
PYTHON
)
# Through the relay, where there is one, uploads keep to their share.
superlink=${LOLA_RELAY:-$LOLA_SUPERLINK}
node_config="profile=\"$LOLA_PROFILE\" worker=\"$LOLA_SOCKET\" ${LOLA_NODE_CONFIG:-}"
# Goes before the name in the profile.
if [ -n "${LOLA_NAME:-}" ]; then node_config="$node_config name=\"$LOLA_NAME\""; fi

export FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE="$chunk"
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL="${FLWR_SUPEREXEC_TASK_POLL_INTERVAL:-0.1}"
export FLWR_TELEMETRY_ENABLED="${FLWR_TELEMETRY_ENABLED:-0}"
export FLWR_DISABLE_UPDATE_CHECK=1
PATH=$(dirname "$LOLA_PYTHON"):$PATH
export PATH

# The port is for Flower's own program, which runs where the resident one cannot.
exec lola-flwr node \
    --superlink "$superlink" \
    --root-certificates "$LOLA_CA" \
    --auth-supernode-private-key "$LOLA_NODE_KEY" \
    --port "${LOLA_SUPERNODE_PORT:-9094}" \
    --node-config "$node_config"
