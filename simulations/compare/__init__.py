"""Compare ways to spend the devices' budgets, all in one process.

The coordinator and the devices are those of a federation; what carries their messages
is not: no Flower, no network. Times and rates are those of the simulated fleet, the
operations, bytes and accuracies are counted here.
"""

import sys
from pathlib import Path

# Flower puts an app's directory there before it loads the app.
for _app in ("glue", "vision"):
    sys.path.append(str(Path(__file__).parents[1] / _app))
