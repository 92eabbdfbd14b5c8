"""Make recordings anew: ``python -m tests.recordings [NAME ...]``."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """Record what is named, or all."""
    # As pytest's pythonpath has it.
    simulations = Path(__file__).parents[2] / "simulations"
    sys.path[:0] = [str(simulations / app) for app in ("glue", "causal")]
    from tests.recordings.runs import FAST, SLOW, record

    for name in sys.argv[1:] or (*FAST, *SLOW, "demo"):
        record(name)
        print(f"{name} is recorded")


if __name__ == "__main__":
    main()
