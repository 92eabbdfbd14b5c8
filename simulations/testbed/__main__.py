"""Run LoLa-DEFT on the testbed, and compare what is measured with what was planned.

    python -m simulations.testbed --out runs/testbed

Under several allocators (``--allocators``), and with either kind of node (``--nodes``).
"""

from __future__ import annotations

import argparse
import csv
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path

from lola_flwr.machine.files import local_path
from simulations.testbed.federation import Federation, federation
from simulations.testbed.measurement import Outcome, Parts, outcome, read_samples
from simulations.testbed.network import Network, inside, network, why_unavailable
from simulations.testbed.options import FLOWERS_NODE, RESIDENT_NODE, Options
from simulations.testbed.programs import TestbedError

_ROOT = Path(__file__).parents[2]
_SAMPLE_S = 0.1
# A layer of 512 wide and its head, in 16 bits.
_PAYLOAD_BYTES = 6.3e6
_NODES = {"lola-flwr": RESIDENT_NODE, "flower": FLOWERS_NODE}


def run_allocator(
    running: Federation,
    allocator: str,
    node: str,
    arguments: argparse.Namespace,
    directory: Path,
) -> Outcome:
    """Run some rounds under one allocator with one kind of node; watch the links.

    Raises
    ------
    TestbedError
        The run did not complete.
    """
    rates = " ".join(f"{rate:g}" for rate in arguments.rates)
    overrides = [
        'model="random:roberta-wide"',
        'codec="fp16"',
        f"rounds={arguments.rounds}",
        f"eval-every={arguments.rounds}",
        "batch-size=4",
        "max-length=16",
        f'uplink-mbps="{rates}"',
        f"num-devices={len(arguments.rates)}",
        f'allocator="{allocator}"',
        f"seed={arguments.seed}",
        f'output-dir="{directory}"',
    ]
    log = directory.with_suffix(".traffic")
    with watched(running.network, log):
        ended = running.run(
            _ROOT / "simulations" / "glue", overrides, echo=_echo_rounds
        )
        time.sleep(2)
    if ended["status"] != "finished:completed":
        raise TestbedError(f"The run under {allocator} is {ended['status']}.")
    return outcome(
        f"{allocator}, {node}",
        directory / "rounds.jsonl",
        read_samples(log.read_text(encoding="ascii")),
        _PAYLOAD_BYTES,
    )


def run_node(
    node: str, arguments: argparse.Namespace, directory: Path
) -> list[Outcome]:
    """Run all allocators with one kind of node."""
    directory.mkdir()
    options = Options(limit=arguments.limit, measured=True, node=_NODES[node])
    outcomes = []
    with (
        network([1e6 * rate for rate in arguments.rates]) as links,
        federation(links, directory, options) as running,
    ):
        for allocator in arguments.allocators:
            print(f"{allocator}, {node}:", flush=True)
            own = directory / allocator
            outcomes.append(run_allocator(running, allocator, node, arguments, own))
    return outcomes


@contextmanager
def watched(links: Network, log: Path) -> Iterator[None]:
    """Write down what the server's interfaces receive."""
    command = [sys.executable, str(Path(__file__).with_name("traffic.py"))]
    command += [str(_SAMPLE_S), *(f"d{index}" for index in range(len(links.devices)))]
    with log.open("wb") as file:
        process = subprocess.Popen(inside(links.server, command), stdout=file)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def table(outcomes: Sequence[Outcome]) -> str:
    """Return what was measured beside what was predicted, as text."""
    lines = []
    for result in outcomes:
        lines += [
            f"{result.allocator}:",
            "  round  device         share  predicted      wire    server   error",
        ]
        for upload in result.uploads:
            server = "-" if upload.server_s is None else f"{upload.server_s:.2f} s"
            lines.append(
                f"  {upload.server_round:5d}  {upload.device:12s} {upload.share:7.4f} "
                f"{upload.predicted_s:8.2f} s {upload.wire_s:7.2f} s {server:>9s} "
                f"{100 * upload.error:+6.1f} %"
            )
        rounds = ", ".join(
            f"{number}: {wall_s:.1f} s ({result.planned_s[number]:.1f} s planned)"
            for number, wall_s in result.wall_s.items()
        )
        lines += [
            f"  rounds from last byte to last byte: {rounds}",
            f"  median error of the predictions: {100 * result.median_error:.1f} %",
            f"  rounds: {statistics.median(result.wall_s.values()):.1f} s, planned "
            f"{100 * result.median_round_error:+.1f} % (medians of "
            f"{len(result.wall_s)})",
        ]
    lines += where_time_goes(outcomes)
    first = outcomes[0]
    for other in outcomes[1:]:
        ratio = first.mean_wall_s / other.mean_wall_s
        lines.append(
            f"a round takes {ratio:.2f} times as long under {first.allocator} as under "
            f"{other.allocator}"
        )
    return "\n".join(lines)


def where_time_goes(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what a round's seconds went to, medians, as a table."""
    names = [field.name.removesuffix("_s") for field in fields(Parts)]
    lines = [
        f"| a round | {' s | '.join(names)} s | all s | planned s |",
        f"|---|{'---:|' * (len(names) + 2)}",
    ]
    for result in outcomes:
        columns = [
            *zip(*map(astuple, result.parts.values()), strict=True),
            result.wall_s.values(),
            [result.planned_s[number] for number in result.wall_s],
        ]
        medians = [f"{statistics.median(column):.1f}" for column in columns]
        lines.append(f"| {result.allocator} | {' | '.join(medians)} |")
    return lines


def write_csv(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write all uploads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "allocator",
                "round",
                "device",
                "share",
                "predicted_s",
                "wire_s",
                "server_s",
            ]
        )
        for result in outcomes:
            for u in result.uploads:
                rows.writerow(
                    [
                        *(result.allocator, u.server_round, u.device, u.share),
                        *(u.predicted_s, u.wire_s, u.server_s),
                    ]
                )


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw measured against predicted uploads, and the rounds of each allocator."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    uploads, rounds = figure.subplots(1, 2)
    largest = max(u.predicted_s for result in outcomes for u in result.uploads)
    for result in outcomes:
        uploads.scatter(
            [u.predicted_s for u in result.uploads],
            [u.wire_s for u in result.uploads],
            s=18,
            label=result.allocator,
        )
        rounds.plot(
            list(result.wall_s),
            list(result.wall_s.values()),
            marker="o",
            label=f"{result.allocator}, measured",
        )
        planned = [result.planned_s[number] for number in result.wall_s]
        rounds.plot(list(result.wall_s), planned, ":", color="grey")
    uploads.plot([0, largest], [0, largest], color="grey", linewidth=1)
    uploads.set_xlabel("predicted upload, s")
    uploads.set_ylabel("upload on the wire, s")
    uploads.legend()
    rounds.set_xlabel("round")
    rounds.set_ylabel("from last byte to last byte, s (dotted: planned)")
    rounds.set_ylim(bottom=0)
    rounds.legend()
    figure.savefig(path)


def main() -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rates", type=float, nargs="+", default=[40.0, 20.0, 10.0, 5.0])
    add("--allocators", nargs="+", default=["exact"])
    add("--nodes", nargs="+", choices=[*_NODES], default=["lola-flwr"])
    add("--rounds", type=int, default=11, help="the first is not timed")
    add("--limit", choices=("pacing", "tc", "none"), default="pacing")
    add("--seed", type=int, default=0)
    add("--out", type=local_path, default=Path("runs/testbed"))
    arguments = parser.parse_args()
    reason = why_unavailable()
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    # What ends this takes down what it set up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments.out.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="run-", dir=arguments.out)).absolute()
    print(f"logs and results: {directory}", flush=True)
    outcomes = []
    try:
        for node in arguments.nodes:
            outcomes += run_node(node, arguments, directory / node)
    except (TestbedError, ValueError, subprocess.SubprocessError) as error:
        print(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        print("stopped")
        return 130
    print(table(outcomes))
    write_csv(outcomes, directory / "uploads.csv")
    plot(outcomes, directory / "uploads.png")
    return 0


def _echo_rounds(line: str) -> None:
    if "round " in line or "ERROR" in line or "error" in line:
        print(f"  {line.strip()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
