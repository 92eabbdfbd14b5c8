"""Run a Flower app in the simulation engine: ``lola-flwr simulate`` from a checkout.

python simulations/run.py simulations/glue --devices 6 'task="sst-2"' 'rounds=30'
"""

from __future__ import annotations

import sys

try:
    from lola_flwr.cli.main import main
except ImportError as error:
    print(
        f"error: {error.name} is not installed for {sys.executable}; run `make venv`, "
        "and this with .venv/bin/python.",
        file=sys.stderr,
    )
    sys.exit(1)

if __name__ == "__main__":
    sys.exit(main(["simulate", *sys.argv[1:]]))
