"""Run LoLa-DEFT on the testbed under several allocators, and compare with the plan.

python -m simulations.testbed --out runs/testbed
"""

from __future__ import annotations

import argparse
import csv
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lola_flwr.machine.files import local_path
from simulations.testbed.federation import (
    Federation,
    Options,
    TestbedError,
    federation,
)
from simulations.testbed.measurement import Outcome, outcome, read_samples
from simulations.testbed.network import Network, inside, network, why_unavailable

_ROOT = Path(__file__).parents[2]
_SAMPLE_S = 0.1
# A layer of 512 wide and its head, in 16 bits.
_PAYLOAD_BYTES = 6.3e6


def run_allocator(
    running: Federation, allocator: str, arguments: argparse.Namespace, directory: Path
) -> Outcome:
    """Run some rounds under one allocator, and watch the links.

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
        allocator,
        directory / "rounds.jsonl",
        read_samples(log.read_text(encoding="ascii")),
        _PAYLOAD_BYTES,
    )


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
        ]
    first = outcomes[0]
    for other in outcomes[1:]:
        ratio = first.mean_wall_s / other.mean_wall_s
        lines.append(
            f"a round takes {ratio:.2f} times as long under {first.allocator} as under "
            f"{other.allocator}"
        )
    return "\n".join(lines)


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
    add("--allocators", nargs="+", default=["exact", "crunch", "random"])
    add("--rounds", type=int, default=3)
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
        with (
            network([1e6 * rate for rate in arguments.rates]) as links,
            federation(links, directory, Options(limit=arguments.limit)) as running,
        ):
            for allocator in arguments.allocators:
                print(f"{allocator}:", flush=True)
                outcomes.append(
                    run_allocator(running, allocator, arguments, directory / allocator)
                )
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
