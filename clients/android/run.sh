#!/data/data/com.termux/files/usr/bin/sh
# Run the phone's worker and SuperNode until Ctrl-C. Plug the phone in, and take Termux
# out of Android's battery optimisation: Android kills what runs behind a dark screen.
#
#   LOLA_UPLINK_MBPS=8 sh run.sh
#
# The first time, the phone is measured, with the uplink's rate and the model LOLA_MODEL
# (default: minilm-l6); to measure again, delete Debian's /etc/lola-flwr/device.json.
# Without a rate the server could not hold it to a share.
set -eu

command -v termux-wake-lock >/dev/null && termux-wake-lock
trap 'command -v termux-wake-unlock >/dev/null && termux-wake-unlock' EXIT

{
    # Nothing of this environment reaches Debian but what is written down here.
    printf "uplink_mbps='%s'\nmodel='%s'\n" \
        "${LOLA_UPLINK_MBPS:-}" "${LOLA_MODEL:-minilm-l6}"
    cat <<'DEBIAN'
. /etc/lola-flwr/device.env
profile=/etc/lola-flwr/device.json
if [ ! -e "$profile" ]; then
    : "${uplink_mbps:?set LOLA_UPLINK_MBPS to the rate of the uplink, in Mbit/s}"
    : "${LOLA_NAME:?set it in /etc/lola-flwr/device.env, another one on each device}"
    /opt/lola-flwr/bin/lola-flwr profile --name "$LOLA_NAME" --model "$model" \
        --uplink-mbps "$uplink_mbps" --out "$profile"
fi
mkdir -p -m 700 /run/lola-flwr
/opt/lola-flwr/libexec/worker.sh &
worker=$!
trap 'kill "$worker"' EXIT
/opt/lola-flwr/libexec/supernode.sh
DEBIAN
} | proot-distro login debian -- sh -eu
