"""Many nodes against one SuperLink: no message is lost, and how often they ask it.

    python -m simulations.testbed.many --nodes 200 --rounds 20
    python -m simulations.testbed.many --nodes 1000 --rounds 0 --idle-s 180

Each node is the loop of ``lola-flwr node``, with a connection, a key and contexts of
its own. As many programs would not fit on one machine; here some hundred are threads
of one process, which has imported Flower once. Rounds are of empty messages. Counted is
where a node asks, so that questions that wait for the SuperLink count when it answers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from simulations.testbed.programs import environment_of, program

_EMPTY = Path(__file__).parent / "empty"
_PER_PROCESS, _APART_S = 250, 0.2
_START_S, _SAMPLE_S = 600.0, 10.0

Counts = MutableSequence[int]


def be_nodes(
    address: str, count: int, polls: Counts, answers: Counts, home: str
) -> None:
    """Be some nodes, a thread each, until SIGTERM.

    Parameters
    ----------
    address
        The SuperLink.
    count
        How many.
    polls, answers
        How often each has asked for a message, and answered one; they count on. Before
        its first question a node is not there.
    home
        Their FLWR_HOME, and where their log is.
    """
    os.environ["FLWR_HOME"] = home
    with Path(home, f"nodes-{os.getpid()}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from flwr.supernode.fleet_http_connection import http_request_response

    from lola_flwr.deployment.node.apps import Apps
    from lola_flwr.deployment.node.serve import Link, Node
    from lola_flwr.deployment.node.stopping import Stop

    options: Any = SimpleNamespace(trusted_entities=None)
    importing = threading.Lock()
    stops = [Stop() for _ in range(count)]

    class OneAfterAnother(Apps):
        """Apps that share this process's modules."""

        def app(self, run: Any, fab: Any) -> Any:
            with importing:
                return super().app(run, fab)

    def be_node(index: int) -> None:
        with http_request_response(address, True) as connection:
            link = Link(*connection)
            link = link._replace(
                receive=_counted(link.receive, polls, index),
                send=_counted(link.send, answers, index),
            )
            apps = OneAfterAnother(link.node_id, {})
            Node(link, apps, options, stops[index]).answer_messages()

    def stop(*_: object) -> None:
        for each in stops:
            each.ask()

    signal.signal(signal.SIGTERM, stop)
    nodes = [threading.Thread(target=be_node, args=(n,)) for n in range(count)]
    for node in nodes:
        node.start()
        # Devices are not switched on at one moment, either.
        time.sleep(_APART_S)
    for node in nodes:
        node.join()


def _counted(function: Callable[..., Any], counts: Counts, index: int) -> Any:
    def counted(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        finally:
            counts[index] += 1

    return counted


@contextmanager
def nodes(
    address: str, count: int, directory: Path
) -> Iterator[tuple[list[Counts], list[Counts]]]:
    """Start nodes; give what they count, by process."""
    context = multiprocessing.get_context("spawn")
    sizes = [
        min(_PER_PROCESS, count - begun) for begun in range(0, count, _PER_PROCESS)
    ]
    polls: list[Any] = [context.Array("q", size, lock=False) for size in sizes]
    answers: list[Any] = [context.Array("q", size, lock=False) for size in sizes]
    processes = [
        context.Process(target=be_nodes, args=(address, *each, str(directory)))
        for each in zip(sizes, polls, answers, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + _START_S
        while not all(map(all, polls)):
            if time.monotonic() > deadline:
                raise RuntimeError("Not all nodes have connected.")
            time.sleep(0.5)
        yield polls, answers
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(30)
            process.kill()


def polls_per_s(polls: Sequence[Counts], seconds: float) -> list[float]:
    """Return how many questions a second there are, in stretches of some seconds."""
    rates, total, begun_s = [], _total(polls), time.monotonic()
    until_s = begun_s + seconds
    while begun_s < until_s:
        time.sleep(_SAMPLE_S)
        now, now_s = _total(polls), time.monotonic()
        rates.append((now - total) / (now_s - begun_s))
        total, begun_s = now, now_s
    return rates


def _total(counts: Sequence[Counts]) -> int:
    return sum(map(sum, counts))


@contextmanager
def superlink(directory: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Start a SuperLink on the loopback; give its address, and how to use it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (directory / "config.toml").write_text(
        '[superlink]\ndefault = "many"\n\n[superlink.many]\n'
        f'address = "{address}"\ninsecure = true\n',
        encoding="utf-8",
    )
    environment = environment_of(directory)
    port = address.rpartition(":")[2]
    with (directory / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            [program("flower-superlink"), "--insecure", "--port", port],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield address, environment
    finally:
        process.terminate()
        process.wait()


def round_seconds(environment: dict[str, str], rounds: int, file: Path) -> list[float]:
    """Run rounds of empty messages to all nodes; return how long each took.

    Raises
    ------
    RuntimeError
        A message was lost, or the run did not begin.
    """
    command = [program("flwr"), "run", str(_EMPTY), "many", "--stream"]
    command += ["--run-config", f'rounds={rounds} seconds-file="{file}"']
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    if not file.exists():
        raise RuntimeError(f"The run did not complete: {done.stdout[-1000:]}")
    seconds: list[float] = json.loads(file.read_text())
    return seconds


def main() -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--nodes", type=int, default=200)
    add("--rounds", type=int, default=20)
    add("--idle-s", type=float, default=0.0, help="how long to watch them idle")
    arguments = parser.parse_args()
    # What ends this takes down what it set up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="lola-many-"))
    count, rounds = arguments.nodes, arguments.rounds
    with (
        superlink(directory) as (address, environment),
        nodes(address, count, directory) as (polls, answers),
    ):
        print(f"{count} nodes are there", flush=True)
        if rounds:
            before, begun_s = _total(polls), time.monotonic()
            seconds = round_seconds(environment, rounds, directory / "seconds.json")
            took_s = time.monotonic() - begun_s
            print(
                f"{rounds} rounds: {count * rounds} messages sent, {_total(answers)} "
                f"answered; a round takes {statistics.median(seconds):.2f} s (median), "
                f"{max(seconds):.2f} s at most; {_total(polls) - before} questions, "
                f"{(_total(polls) - before) / took_s:.0f} a second",
                flush=True,
            )
        for number, rate in enumerate(polls_per_s(polls, arguments.idle_s), 1):
            print(
                f"idle for {number * _SAMPLE_S:.0f} s: {rate:.0f} questions a second",
                flush=True,
            )
        return int(_total(answers) != count * rounds)


if __name__ == "__main__":
    sys.exit(main())
