#!/bin/sh
# Start this device's worker with what /etc/lola-flwr/device.env says.
set -eu

env_file=${LOLA_ENV:-/etc/lola-flwr/device.env}
# shellcheck source=/dev/null
. "$env_file"

set -- --socket "$LOLA_SOCKET" --superlink "$LOLA_SUPERLINK"
if [ -n "${LOLA_RELAY:-}" ]; then
    set -- "$@" --relay "$LOLA_RELAY"
elif [ -n "${LOLA_TC:-}" ]; then
    set -- "$@" --tc "$LOLA_TC"
fi
exec "${LOLA_WORKER_PYTHON:-$LOLA_PYTHON}" -m lola_flwr.deployment.serve_worker "$@"
