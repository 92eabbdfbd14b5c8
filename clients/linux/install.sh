#!/bin/sh
# Install a lola-flwr device on a Linux board or PC (systemd, Python 3.11 or later).
#
#   install.sh SUPERLINK CA_CRT NODE_KEY [PACKAGE]
#
# SUPERLINK   host:port, as the SuperLink's certificate names it
# CA_CRT      the authority's certificate, and
# NODE_KEY    this device's private key: both from make-keys.sh
# PACKAGE     what to install: a wheel, a checkout, or a requirement
#             (default: this checkout with what the GLUE app needs)
#
# Run as root. It makes the user lola, /opt/lola-flwr (programs), /etc/lola-flwr (keys and
# configuration), and two services; it overwrites no key and no configuration.
# LOLA_BASE_PYTHON names the Python for /opt/lola-flwr (default: python3). Where the server
# has an older Flower, PIP_CONSTRAINT names a file that says which (docs/deployment.md).
# PyPI's PyTorch brings some gigabytes of CUDA, on ARM too; where there is no GPU of
# NVIDIA's, it comes from LOLA_TORCH_INDEX (default: PyTorch's own index of builds for the
# CPU; empty: from PyPI after all).
set -eu
umask 022

here=$(cd "$(dirname "$0")" && pwd)
prefix=/opt/lola-flwr
etc=/etc/lola-flwr

fail() {
    echo "error: $*" >&2
    exit 1
}

case ${1:-} in
    -h | --help)
        sed -n '2,18s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
esac
[ $# -ge 3 ] || fail "give SUPERLINK CA_CRT NODE_KEY; --help says more."
[ "$(id -u)" = 0 ] || fail "run this as root."
command -v systemctl >/dev/null || fail "there is no systemd here; see docs/deployment.md."
superlink=$1
ca=$2
key=$3
# Keys are made by the name of their device; host names may be the same on all.
name=$(basename "$key")
package=${4:-$here/../..[glue,adapters,offline]}
python=${LOLA_BASE_PYTHON:-python3}
case $superlink in *:[0-9]*) ;; *) fail "SUPERLINK '$superlink' has no port." ;; esac
[ -r "$ca" ] || fail "$ca cannot be read."
[ -r "$key" ] || fail "$key cannot be read."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is older than 3.11, which Flower needs; set LOLA_BASE_PYTHON."
"$python" -c 'import sys; sys.exit(sys.maxsize < 2**32)' ||
    fail "$python is a 32-bit program; only 64-bit systems have wheels of PyTorch."
cpu_builds=https://download.pytorch.org/whl/cpu
if command -v nvidia-smi >/dev/null; then cpu_builds=; fi
torch_index=${LOLA_TORCH_INDEX-$cpu_builds}

id lola >/dev/null 2>&1 ||
    useradd --system --home-dir /var/lib/lola-flwr --shell /usr/sbin/nologin lola
[ -x "$prefix/bin/python" ] || "$python" -m venv "$prefix"
if [ -n "${LOLA_WORKER_PYTHON:-}" ]; then
    # The worker's own Python has PyTorch; this one carries messages.
    "$prefix/bin/pip" install --quiet "flwr>=1.41,<2" "numpy>=2,<3" "ml-dtypes>=0.5" \
        "xxhash>=3"
    "$prefix/bin/pip" install --quiet --no-deps "$package"
else
    has_torch='import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'
    if [ -n "$torch_index" ] && ! "$prefix/bin/python" -c "$has_torch"; then
        "$prefix/bin/pip" install --quiet --index-url "$torch_index" torch
    fi
    "$prefix/bin/pip" install --quiet "$package"
fi
install -D -m 755 -t "$prefix/libexec" "$here/worker.sh" "$here/supernode.sh"

install -d -m 750 -g lola "$etc"
keep() {
    if [ -e "$2" ]; then
        echo "kept $2"
    else
        install -m 640 -g lola "$1" "$2"
    fi
}
keep "$ca" "$etc/ca.crt"
keep "$key" "$etc/node.key"
if [ -e "$etc/device.env" ]; then
    echo "kept $etc/device.env"
else
    sed -e "s|^LOLA_SUPERLINK=.*|LOLA_SUPERLINK=$superlink|" \
        -e "s|^LOLA_NAME=.*|LOLA_NAME=$name|" \
        -e "s|^LOLA_WORKER_PYTHON=.*|LOLA_WORKER_PYTHON=${LOLA_WORKER_PYTHON:-}|" \
        "$here/device.env.example" >"$etc/device.env"
    chmod 640 "$etc/device.env"
    chgrp lola "$etc/device.env"
fi
install -m 644 -t /etc/systemd/system \
    "$here/lola-worker.service" "$here/lola-supernode.service"
# An image that is being made has no systemd that runs.
if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi

cat <<DONE
Installed. Give the device its part of the data (LOLA_NODE_CONFIG in $etc/device.env),
measure it (2 minutes at most), and start it:

  ${LOLA_WORKER_PYTHON:-$prefix/bin/python} -m lola_flwr.cli.profile --name $name \\
      --model MODEL --uplink-mbps RATE --out $etc/device.json
  systemctl enable --now lola-worker lola-supernode
  journalctl -fu lola-supernode
DONE
