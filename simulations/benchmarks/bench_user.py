"""What a user waits for: ``lola-flwr plan`` from the shell, and a report to open.

Run with ``pytest simulations/benchmarks/bench_user.py``.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace

import pytest

from lola_flwr.allocation import RoundMode
from lola_flwr.report import Report, Run
from tests.report.chromium import chromium
from tests.report.sample_runs import sample_run

PROGRAMS = {
    "bare Python": "pass",
    "numpy and scipy.optimize": "import numpy, scipy.optimize",
    "lola-flwr plan, 20 devices": (
        "from lola_flwr.cli.main import main; main(['plan', '--devices', '20'])"
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_start_up(benchmark, name):
    command = [sys.executable, "-c", PROGRAMS[name]]
    benchmark.pedantic(
        lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL),
        rounds=5,
        warmup_rounds=1,
    )


@pytest.fixture(scope="module")
def run():
    """One hundred rounds in which all of 50 devices take part."""
    everyone = RoundMode(participation="all")
    return sample_run("big", num_devices=50, num_rounds=100, mode=everyone)


def test_write_report(benchmark, run, tmp_path):
    path = benchmark.pedantic(
        Report([run]).save, args=(tmp_path / "report.html",), rounds=5
    )
    benchmark.extra_info["bytes"] = path.stat().st_size
    print(f"\nreport: {path.stat().st_size / 1e6:.2f} MB")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Five thousand rounds of 100 devices, as they are on the disk: 0.3 GB."""
    everyone = RoundMode(participation="all")
    short = sample_run("big", num_devices=100, num_rounds=12, mode=everyone)
    directory = tmp_path_factory.mktemp("long")
    with (directory / "rounds.jsonl").open("w") as file:
        for number in range(1, 5001):
            record = short.rounds[-(number % 8) - 1]
            file.write(replace(record, server_round=number).to_json() + "\n")
    return directory


def test_write_long_report(benchmark, long_run):
    program = (
        f"from lola_flwr.cli.main import main; main(['report', {str(long_run)!r}])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    benchmark.pedantic(
        lambda: subprocess.run([sys.executable, "-c", program], check=True), rounds=1
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    size = (long_run / "report.html").stat().st_size
    print(
        f"\nlong report: {size / 1e6:.2f} MB, "
        f"{after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.1f} s "
        "of CPU"
    )


@pytest.mark.parametrize("length", ["short", "long"])
def test_open_report(length, run, long_run, tmp_path):
    shown = run if length == "short" else Run.read(long_run)
    path = Report([shown]).save(tmp_path / "report.html")
    with chromium(tmp_path / "profile") as browser:
        ready_ms = []
        for _ in range(5):
            browser.get(path.as_uri())
            assert browser.execute_script(
                "return document.documentElement.dataset.ready"
            )
            ready_ms.append(
                browser.execute_script(
                    "return performance.timing.loadEventEnd"
                    " - performance.timing.navigationStart"
                )
            )
    print(
        f"\n{length} report: interactive after {sorted(ready_ms)[2]} ms (median of 5)"
    )
