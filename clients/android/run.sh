#!/data/data/com.termux/files/usr/bin/sh
# Run the phone's worker and SuperNode until Ctrl-C. Plug the phone in, and take Termux
# out of Android's battery optimisation: Android kills what runs behind a dark screen.
set -eu

command -v termux-wake-lock >/dev/null && termux-wake-lock
trap 'command -v termux-wake-unlock >/dev/null && termux-wake-unlock' EXIT

proot-distro login debian -- sh -eu <<'DEBIAN'
profile=/etc/lola-flwr/device.json
if [ ! -e "$profile" ]; then
    /opt/lola-flwr/bin/lola-flwr profile --model "${LOLA_MODEL:-minilm-l6}" --out "$profile"
fi
mkdir -p -m 700 /run/lola-flwr
/opt/lola-flwr/libexec/worker.sh &
worker=$!
trap 'kill "$worker"' EXIT
/opt/lola-flwr/libexec/supernode.sh
DEBIAN
