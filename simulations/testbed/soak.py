"""A long run on the testbed while its parts are killed, hang and lose their links.

    python -m simulations.testbed.soak --rounds 300 --out runs/soak

Three devices with TLS, keys, relays and resident workers. Every few rounds something
fails, each kind in turn, whoever it strikes drawn by lot. A killed SuperLink ends
Flower's run with it; it is asked for again, and goes on from its checkpoint. (The clock
is left alone: it is the whole machine's.)
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lola_flwr.machine.files import local_path
from simulations.testbed.federation import Federation, federation
from simulations.testbed.network import cut, network, shaped, why_unavailable
from simulations.testbed.options import RESIDENT_NODE, Options
from simulations.testbed.programs import TestbedError
from simulations.testbed.watch import Growth, Sample, Watch, growth

_APP = Path(__file__).parents[1] / "glue"
_RATES_BPS = (8e6, 6e6, 4e6)
_SLOW_BPS = 2e5
_GONE_S, _HANGS_S, _SERVER_RESTART_S = 30.0, 20.0, 5.0
# A device whose update was lost rests; what it loses so many rounds later is not that.
_AFTERWARDS_ROUNDS = 6

Harm = Callable[[Federation, int], object]


def _kill_node(running: Federation, device: int) -> None:
    running.kill(f"supernode-{device}")
    running.restart_supernode(device)


def _kill_worker(running: Federation, device: int) -> None:
    running.kill(f"worker-{device}")
    running.follow_worker(device)


def _hang_worker(running: Federation, device: int) -> None:
    running.freeze(f"worker-{device}")
    running.follow_worker(device)


def _hang_node(running: Federation, device: int) -> None:
    running.freeze(f"supernode-{device}")
    time.sleep(_HANGS_S)
    running.thaw(f"supernode-{device}")


def _cut_network(running: Federation, device: int) -> None:
    with cut(running.network, device):
        time.sleep(_GONE_S)


def _slow_link(running: Federation, device: int) -> None:
    with shaped(running.network, device, _SLOW_BPS):
        time.sleep(_GONE_S)


def _kill_superlink(running: Federation, device: int) -> None:
    running.kill("superlink")
    time.sleep(_SERVER_RESTART_S)
    running.start_superlink()


# By what the table says; the last one rarely, since all are struck.
_HARMS: Mapping[str, Harm] = {
    "node killed": _kill_node,
    "worker killed": _kill_worker,
    "worker hangs": _hang_worker,
    "node hangs for 20 s": _hang_node,
    "network gone for 30 s": _cut_network,
    "link slow for 30 s": _slow_link,
}
_SERVER_KILLED = "SuperLink killed"


@dataclass(frozen=True)
class Fault:
    """What failed, and in which rounds that can be seen.

    Parameters
    ----------
    kind
        What.
    device
        Number of the device that it struck; None if all.
    rounds
        From the round in which it began to the one in which it was over.
    """

    kind: str
    device: int | None
    rounds: range

    def explains(self, server_round: int, device: str) -> bool:
        """Tell whether a device may have lost a round's update by it."""
        there = self.rounds.start <= server_round < self.rounds.stop
        return there and (self.device is None or device == f"device-{self.device:04d}")

    def strikes(self, program: str) -> bool:
        """Tell whether a program is one of the device's, as `Federation` names it."""
        name, _, device = program.split(":")[0].rpartition("-")
        return bool(name) and self.device in (int(device), None)


def harm(
    running: Federation, watch: Watch, faults: list[Fault], options: argparse.Namespace
) -> None:
    """Let one thing after the other fail, until the rounds are over."""
    lot = random.Random(options.seed)
    next_round = options.every
    for number, kind in enumerate(itertools.cycle(_HARMS), 1):
        if number % options.server_every == 0:
            kind = _SERVER_KILLED
        while watch.round() < next_round:
            time.sleep(0.1)
        if next_round > options.rounds - options.every:
            return
        device = lot.randrange(len(_RATES_BPS))
        begun = watch.round() + 1
        time.sleep(lot.uniform(0, 1))
        print(f"round {begun}: {kind}, device {device}", flush=True)
        struck = None if kind == _SERVER_KILLED else device
        # It stands from its beginning on: the run may end before it is over.
        fault = Fault(kind, struck, range(begun, options.rounds + 1))
        faults.append(fault)
        if kind == _SERVER_KILLED:
            _kill_superlink(running, device)
        else:
            _HARMS[kind](running, device)
        over = watch.round() + 1 + _AFTERWARDS_ROUNDS
        faults[-1] = replace(fault, rounds=range(begun, over + 1))
        next_round = max(next_round, watch.round()) + options.every


def soak(options: argparse.Namespace, directory: Path) -> str:
    """Run it all; return the table.

    Raises
    ------
    TestbedError
        Something did not come up, or the run came to no end.
    """
    out = directory / "out"
    overrides = [
        "model=random:roberta-tiny",
        *("batch-size=4", "max-length=16", "interface=message"),
        f"num-devices={len(_RATES_BPS)}",
        f"uplink-mbps={' '.join(f'{rate / 1e6:g}' for rate in _RATES_BPS)}",
        *(f"rounds={options.rounds}", "eval-every=50", f"output-dir={out}"),
    ]
    faults: list[Fault] = []
    with (
        network(_RATES_BPS) as links,
        federation(
            links, directory, Options(node=RESIDENT_NODE, keeps_state=True)
        ) as running,
    ):
        watch = Watch(running, out / "rounds.jsonl")
        harming = threading.Thread(
            target=harm, args=(running, watch, faults, options), daemon=True
        )
        with watch.watching():
            harming.start()
            starts = 1

            def count(line: str) -> None:
                nonlocal starts
                if "starting again" in line:
                    starts += 1
                    print(line, end="", flush=True)

            if running.serve(_APP, overrides, echo=count):
                raise TestbedError(f"The run ended after round {watch.round()}.")
    taken = [[*program, samples] for program, samples in watch.samples.items()]
    (directory / "samples.json").write_text(json.dumps(taken), encoding="ascii")
    records = [json.loads(line) for line in watch.log.read_text().splitlines()]
    return table(records, faults, longest_lived(watch.samples, faults), starts)


def longest_lived(
    samples: Mapping[tuple[str, int], Sequence[Sample]], faults: Sequence[Fault]
) -> dict[str, Growth]:
    """Return how each program's longest-lived process has grown, by name."""
    longest: dict[str, Growth] = {}
    for (name, _), of_process in samples.items():
        struck = [fault.rounds for fault in faults if fault.strikes(name)]
        grown = growth(of_process, struck)
        before = longest.get(name)
        if grown and (before is None or grown.num_rounds > before.num_rounds):
            longest[name] = grown
    return longest


def table(
    records: Sequence[Mapping[str, Any]],
    faults: Sequence[Fault],
    grown: Mapping[str, Growth],
    starts: int,
) -> str:
    """Return what became of the rounds, the updates and the memory, as text."""
    lost = [
        (record["server_round"], block["device"], block["status"])
        for record in records
        for block in record["blocks"]
        if block["status"] != "accepted"
    ]
    by_kind: Counter[str] = Counter()
    unexplained = []
    for server_round, device, status in lost:
        for fault in reversed(faults):
            if fault.explains(server_round, device):
                by_kind[fault.kind] += 1
                break
        else:
            unexplained.append(f"round {server_round}, {device}: {status}")
    in_time = sum(
        record["measured_round_s"] <= 1.5 * record["measured_deadline_s"]
        for record in records
    )
    lines = ["| fault | times | updates lost |", "|---|---:|---:|"]
    for kind in (*_HARMS, _SERVER_KILLED):
        times = sum(fault.kind == kind for fault in faults)
        lines.append(f"| {kind} | {times} | {by_kind[kind]} |")
    asked = sum(len(record["blocks"]) for record in records)
    last = {block["device"] for record in records[-8:] for block in record["blocks"]}
    lines += [
        "",
        f"{len(records)} rounds in {starts} starts, {in_time} of them over by their "
        f"deadline; median {_median(records, 'measured_round_s'):.2f} s",
        f"{asked} updates asked for, {len(lost)} lost, of which no fault explains "
        f"{len(unexplained)}: {', '.join(unexplained[:8]) or '-'}",
        f"devices in the last rounds: {', '.join(sorted(last))}",
        "",
        "| program | kB a round | MB by faults | files a round | rounds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, of in sorted(grown.items()):
        slope_kb, by_faults_mb = of.bytes_a_round / 1e3, of.bytes_by_faults / 1e6
        lines.append(
            f"| {name} | {slope_kb:+.1f} | {by_faults_mb:+.1f} | "
            f"{of.files_a_round:+.3f} | {of.num_rounds} |"
        )
    return "\n".join(lines)


def _median(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.median(float(record[name]) for record in records)


def main() -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=300)
    add("--every", type=int, default=8, help="rounds from one fault to the next")
    add("--server-every", type=int, default=14, help="faults per killed SuperLink")
    add("--seed", type=int, default=0)
    add("--out", type=local_path, default=Path("runs/soak"))
    options = parser.parse_args()
    reason = why_unavailable()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    # What ends this takes down what it set up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.out.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="soak-", dir=options.out)).absolute()
    print(f"logs and results: {directory}", flush=True)
    try:
        printed = soak(options, directory)
    except TestbedError as error:
        print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        print("stopped")
        return 130
    print(printed)
    (directory / "table.md").write_text(printed + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
