"""Attacks on a run, against the server as it is: `python -m simulations.attacks`."""

import sys
from pathlib import Path

# Flower puts an app's directory there before it loads the app.
sys.path.append(str(Path(__file__).parents[1] / "glue"))
