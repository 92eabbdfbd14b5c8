#!/data/data/com.termux/files/usr/bin/sh
# Make a lola-flwr device of an Android phone: Termux, with a Debian under proot in it.
#
#   sh setup.sh SUPERLINK CA_CRT NODE_KEY     in Termux (from F-Droid), in a checkout
#
# The arguments are those of ../linux/install.sh. Flower's Kotlin and C++ clients speak a
# protocol that Flower has left, and no wheels are built for Android itself; in Debian
# under proot the ordinary ones for ARM run, on the CPU. Not tried on a phone.
# LOLA_TORCH_INDEX is where PyTorch comes from (default: PyTorch's own index of builds for
# the CPU; empty: PyPI, whose builds bring some gigabytes of CUDA).
set -eu

fail() {
    echo "error: $*" >&2
    exit 1
}

case ${1:-} in
    -h | --help)
        sed -n '2,11s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
esac
[ $# -eq 3 ] || fail "give SUPERLINK CA_CRT NODE_KEY; --help says more."
command -v pkg >/dev/null || fail "run this in Termux."
[ "$(uname -m)" = aarch64 ] || fail "only 64-bit ARM has wheels of PyTorch."
[ -r "$2" ] || fail "$2 cannot be read."
[ -r "$3" ] || fail "$3 cannot be read."
checkout=$(cd "$(dirname "$0")/../.." && pwd)

pkg install -y proot-distro termux-api
if ! proot-distro login debian -- true 2>/dev/null; then proot-distro install debian; fi

given=$(mktemp -d)
trap 'rm -rf "$given"' EXIT
cp "$2" "$given/ca.crt"
cp "$3" "$given/node.key"
printf '%s' "$1" >"$given/superlink"
basename "$3" >"$given/name"
torch_index=${LOLA_TORCH_INDEX-https://download.pytorch.org/whl/cpu}
printf '%s' "${torch_index:+--index-url $torch_index}" >"$given/torch-options"
proot-distro login debian \
    --bind "$checkout:/mnt/lola-flwr" --bind "$given:/mnt/given" -- sh -eu <<'DEBIAN'
apt-get update -q
apt-get install -qy python3 python3-venv
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'
[ -x /opt/lola-flwr/bin/python ] || python3 -m venv /opt/lola-flwr
pip=/opt/lola-flwr/bin/pip
# shellcheck disable=SC2046  # None, or two words.
$pip install --quiet $(cat /mnt/given/torch-options) torch
$pip install --quiet '/mnt/lola-flwr[glue,adapters,offline]'
install -D -m 755 -t /opt/lola-flwr/libexec \
    /mnt/lola-flwr/clients/linux/worker.sh /mnt/lola-flwr/clients/linux/supernode.sh
install -d -m 700 /etc/lola-flwr
[ -e /etc/lola-flwr/ca.crt ] || install -m 600 /mnt/given/ca.crt /etc/lola-flwr
[ -e /etc/lola-flwr/node.key ] || install -m 600 /mnt/given/node.key /etc/lola-flwr
[ -e /etc/lola-flwr/device.env ] ||
    sed -e "s|^LOLA_SUPERLINK=.*|LOLA_SUPERLINK=$(cat /mnt/given/superlink)|" \
        -e "s|^LOLA_NAME=.*|LOLA_NAME=$(cat /mnt/given/name)|" \
        /mnt/lola-flwr/clients/linux/device.env.example >/etc/lola-flwr/device.env
DEBIAN
echo "Installed. Give the phone its part of the data (LOLA_NODE_CONFIG in Debian's"
echo "/etc/lola-flwr/device.env), and start it: LOLA_UPLINK_MBPS=8 sh run.sh"
