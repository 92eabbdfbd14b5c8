"""What a round and a message cost beside training, with either kind of SuperNode.

    python -m simulations.testbed.overhead

First rounds, from the messages' sending to the last reply's last byte, on the server's
clock: of empty messages to one device, and of the GLUE app's tiny model on four, with
Flower's SuperNode and workers, and with `lola-flwr node`. A tiny model and fast links,
so that neither training nor the links count. Then steps of D2FT of that model, whose
exchanges follow each other, with either in turn; it fails if their losses differ.

Then messages, in Flower's own count (``flwr list``, compute-time): from the moment
that the client's process asks for a message to that in which its reply is with the
SuperNode. So they hold what Flower takes to move arrays between the two, which a client
that sends as many bytes back unseen shows: for the model's values by name, and in one
array, as they are sent. A run of one round is subtracted from one of six, which leaves
the messages from the second on.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import load_classifier
from simulations.testbed.federation import Federation, federation
from simulations.testbed.network import network, why_unavailable
from simulations.testbed.options import FLOWERS_NODE, RESIDENT_NODE, Options

_HERE = Path(__file__).parent
_EMPTY = _HERE / "empty"
_GLUE = _HERE.parent / "glue"
_ROUNDS = 6
# Of each kind of round, after one more that loads what stays.
_TIMED_ROUNDS = 20
_NODES = 4
# Of D2FT, by run, after one more; each kind of SuperNode has so many runs, in turn.
_TIMED_STEPS, _STEP_RUNS = 2, 2
_TINY_MODEL = (
    'model="random:roberta-tiny"',
    "batch-size=4",
    "max-length=16",
    "eval-every=100",
    'interface="message"',
)
# One device trains all blocks: a federation of one.
_TINY = (*_TINY_MODEL, 'method="fedavg-full"', "num-devices=1")
_D2FT = (
    *_TINY_MODEL,
    'method="d2ft"',
    'd2ft-options="micro_batches=4"',
    f"num-devices={_NODES}",
    f"rounds={_TIMED_STEPS + 1}",
)


def seconds_per_message(
    running: Federation, app: Path, overrides: Sequence[str]
) -> tuple[float, float]:
    """Return the seconds of a first run of one round, and of each later message."""
    total = []
    for rounds in (1, 1, _ROUNDS):
        ended = _run(running, app, [*overrides, f"rounds={rounds}"])
        total.append(float(ended["compute-time"]["clientapp-seconds"]))
    return total[0], (total[2] - total[1]) / (_ROUNDS - 1)


def round_seconds(node: tuple[str, ...]) -> tuple[list[float], list[float]]:
    """Return the seconds of rounds with one kind of SuperNode.

    Parameters
    ----------
    node
        The program that it is.

    Returns
    -------
    Those of empty messages to one device, and those of the tiny model on four, each
    but the first.
    """
    rounds = f"rounds={_TIMED_ROUNDS + 1}"
    with _running(1, Options(worker=False, node=node)) as running:
        file = running.directory / "seconds.json"
        _run(running, _EMPTY, [rounds, f'seconds-file="{file}"'])
        empty = json.loads(file.read_text())
    with _running(_NODES, Options(limit="none", node=node)) as running:
        out = running.directory / "out"
        own = [rounds, f"num-devices={_NODES}", f'output-dir="{out}"']
        _run(running, _GLUE, [*_TINY, *own])
        lines = (out / "rounds.jsonl").read_text().splitlines()
        tiny = [json.loads(line)["measured_round_s"] for line in lines]
    return empty[1:], tiny[1:]


def steps(node: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the records of D2FT's steps with one kind of SuperNode.

    Parameters
    ----------
    node
        The program that it is.
    """
    with _running(_NODES, Options(limit="none", node=node)) as running:
        out = running.directory / "out"
        _run(running, _GLUE, [*_D2FT, f'output-dir="{out}"'])
        lines = (out / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def main() -> int:
    """Measure, and print three tables; return the exit code."""
    reason = why_unavailable()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    # What ends this takes down what it set up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _print_rounds()
    _print_steps()
    _print_messages()
    return 0


def _print_rounds() -> None:
    flowers, resident = (
        [statistics.median(seconds) for seconds in round_seconds(node)]
        for node in (FLOWERS_NODE, RESIDENT_NODE)
    )
    print(f"| a round, median of {_TIMED_ROUNDS} | Flower's, s | node, s | ratio |")
    print("|---|---:|---:|---:|")
    for title, theirs_s, ours_s in zip(
        ("1 node, empty message", f"{_NODES} nodes, tiny model, workers"),
        flowers,
        resident,
        strict=True,
    ):
        print(f"| {title} | {theirs_s:.2f} | {ours_s:.2f} | {ours_s / theirs_s:.3f} |")


def _print_steps() -> None:
    seconds: dict[tuple[str, ...], list[float]] = {FLOWERS_NODE: [], RESIDENT_NODE: []}
    losses = set()
    for node in [*seconds] * _STEP_RUNS:
        records = steps(node)
        losses.add(tuple(record["train_loss"] for record in records))
        seconds[node] += [record["measured_s"] for record in records[1:]]
    if len(losses) != 1:
        raise RuntimeError(f"The losses differ: {losses}.")
    flowers_s, ours_s = map(statistics.median, seconds.values())
    print("| a step of D2FT | exchanges | Flower's, s | node, s | ratio |")
    print("|---|---:|---:|---:|---:|")
    print(
        f"| {_NODES} nodes, tiny model, workers, median of "
        f"{_TIMED_STEPS * _STEP_RUNS} | {records[1]['exchanges']} | {flowers_s:.2f} "
        f"| {ours_s:.2f} | {ours_s / flowers_s:.3f} |"
    )


def _print_messages() -> None:
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
        with _running(1, options) as running:
            rows.append((title, *seconds_per_message(running, app, overrides)))
        print(f"{title}: {rows[-1][1]:.2f} s, then {rows[-1][2]:.2f} s", flush=True)
    empty_s = rows[0][2]
    print("| a message | first run, s | each from the second on, s | beyond empty, s |")
    print("|---|---:|---:|---:|")
    for title, first_s, later_s in rows:
        print(f"| {title} | {first_s:.2f} | {later_s:.2f} | {later_s - empty_s:.2f} |")


@contextmanager
def _running(num_devices: int, options: Options) -> Iterator[Federation]:
    directory = Path(tempfile.mkdtemp(prefix="lola-overhead-"))
    with (
        network([1e9] * num_devices) as links,
        federation(links, directory, options) as running,
    ):
        yield running


def _run(running: Federation, app: Path, overrides: Sequence[str]) -> dict[str, Any]:
    ended = running.run(app, overrides)
    if ended["status"] != "finished:completed":
        raise RuntimeError(f"The run of {app.name} is {ended['status']}.")
    return ended


def _arrays(sizes: Sequence[int]) -> tuple[str, str]:
    """Return the empty app's configuration for so many arrays of their mean size."""
    return f"num-arrays={len(sizes)}", f"array-bytes={sum(sizes) // len(sizes)}"


if __name__ == "__main__":
    sys.exit(main())
