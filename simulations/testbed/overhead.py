"""What a message costs a device: empty, with arrays, with client or resident worker.

    python -m simulations.testbed.overhead

One device and a tiny model, so that neither the link nor training counts. The seconds
are Flower's own: from the moment that the client's process asks for a message to that
in which its reply is with the SuperNode (``flwr list``, compute-time). So they hold
what Flower takes to move arrays between the two, which a client that sends as many
bytes back unseen shows: for the model's values by name, and in one array, as they are
sent. A run of one round is subtracted from one of six, which leaves the messages from
the second on.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import load_classifier
from simulations.testbed.federation import Federation, Options, federation
from simulations.testbed.network import network, why_unavailable

_HERE = Path(__file__).parent
_EMPTY = _HERE / "empty"
_GLUE = _HERE.parent / "glue"
_ROUNDS = 6
# One device trains all blocks: a federation of one.
_TINY = (
    'model="random:roberta-tiny"',
    'method="fedavg-full"',
    "num-devices=1",
    "batch-size=4",
    "max-length=16",
    "eval-every=100",
    'interface="message"',
)


def seconds_per_message(
    running: Federation, app: Path, overrides: Sequence[str]
) -> tuple[float, float]:
    """Return the seconds of a first run of one round, and of each later message."""
    total = []
    for rounds in (1, 1, _ROUNDS):
        ended = running.run(app, [*overrides, f"rounds={rounds}"])
        if ended["status"] != "finished:completed":
            raise RuntimeError(f"The run of {app.name} is {ended['status']}.")
        total.append(float(ended["compute-time"]["clientapp-seconds"]))
    return total[0], (total[2] - total[1]) / (_ROUNDS - 1)


def main() -> int:
    """Measure, and print a table; return the exit code."""
    reason = why_unavailable()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    # What ends this takes down what it set up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows = []
    model, _ = load_classifier("random:roberta-tiny", num_labels=2)
    parameters = dict(model.named_parameters())
    sizes = [
        parameters[name].nbytes for name in partition_parameters(parameters).trainable
    ]
    for title, options, app, overrides in (
        ("empty message", Options(worker=False), _EMPTY, ()),
        ("the model's values by name", Options(worker=False), _EMPTY, _arrays(sizes)),
        ("in one array", Options(worker=False), _EMPTY, _arrays([sum(sizes)])),
        ("in the client's process", Options(worker=False), _GLUE, _TINY),
        ("with the worker", Options(limit="none"), _GLUE, _TINY),
    ):
        directory = Path(tempfile.mkdtemp(prefix="lola-overhead-"))
        with (
            network([1e9]) as links,
            federation(links, directory, options) as running,
        ):
            rows.append((title, *seconds_per_message(running, app, overrides)))
        print(f"{title}: {rows[-1][1]:.2f} s, then {rows[-1][2]:.2f} s", flush=True)
    empty_s = rows[0][2]
    print("| a message | first run, s | each from the second on, s | beyond empty, s |")
    print("|---|---:|---:|---:|")
    for title, first_s, later_s in rows:
        print(f"| {title} | {first_s:.2f} | {later_s:.2f} | {later_s - empty_s:.2f} |")
    return 0


def _arrays(sizes: Sequence[int]) -> tuple[str, str]:
    """Return the empty app's configuration for so many arrays of their mean size."""
    return f"num-arrays={len(sizes)}", f"array-bytes={sum(sizes) // len(sizes)}"


if __name__ == "__main__":
    sys.exit(main())
