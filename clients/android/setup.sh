#!/data/data/com.termux/files/usr/bin/sh
# Make a lola-flwr device of an Android phone: Termux, with a Debian under proot in it.
#
#   sh setup.sh        in Termux (from F-Droid), once
#
# Flower's Kotlin and C++ clients speak a protocol that Flower left in 2024, and no wheels
# are built for Android itself; in Debian under proot the ordinary ones for ARM run, on the
# CPU. Not tried on a phone.
set -eu

fail() {
    echo "error: $*" >&2
    exit 1
}

command -v pkg >/dev/null || fail "run this in Termux."
[ "$(uname -m)" = aarch64 ] || fail "only 64-bit ARM has wheels of PyTorch."

pkg install -y proot-distro termux-api
proot-distro list --verbose 2>/dev/null | grep -q 'debian.*installed' ||
    proot-distro install debian
proot-distro login debian -- sh -eu <<'DEBIAN'
apt-get update -q
apt-get install -qy python3 python3-venv
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'
[ -x /opt/lola-flwr/bin/python ] || python3 -m venv /opt/lola-flwr
/opt/lola-flwr/bin/pip install --quiet --index-url https://download.pytorch.org/whl/cpu torch
/opt/lola-flwr/bin/pip install --quiet 'flwr>=1.41,<1.42' lola-flwr
mkdir -p -m 700 /etc/lola-flwr
DEBIAN
cat <<'DONE'
Installed. Copy ca.crt and this phone's key into Debian's /etc/lola-flwr (as ca.crt and
node.key), the scripts of clients/linux to /opt/lola-flwr/libexec, and device.env.example
to /etc/lola-flwr/device.env; set LOLA_SUPERLINK in it. Then: sh run.sh
DONE
