"""Make the figures: ``python -m simulations.figures --out runs/figures``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lola_flwr.errors import UserError
from lola_flwr.machine.files import local_path
from simulations.figures import (
    depth,
    latency,
    learning,
    outcomes,
    pages,
    plots,
    summary,
)
from simulations.figures.tables import Row, markdown_table, numbers, write_csv

_OUR_CHOICE = "Fleets (20–400 GFLOP/s, 1–8 GB), batch and 16-bit payload are our choice"
_SNR_DB = (-5.0, 0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
_DEVICES = (12, 16, 20, 30, 50, 100)
_ROTATION_DEVICES = 12
_BANDWIDTH_MHZ = (5.0, 10.0, 20.0, 50.0, 100.0)
# Equal-share baselines of the paper's kind; CRUNCH with equal shares is the paper's own
# solution for a fixed bandwidth (P2), and so judged apart.
_EQUAL_SHARE_BASELINES = ("random", "greedy")


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    out: Path
    fleets: int
    learning: learning.LearningSetting
    page: pages.Page

    @property
    def draws(self) -> list[latency.Draw]:
        """Draws of all latency figures: two rounds of each fleet."""
        return latency.draws(self.fleets, rounds=2)


def fig4a(options: Options) -> None:
    """Time and memory of each depth."""
    rows = depth.depth_rows(report=partial(print, flush=True))
    write_csv(options.out / "fig4a.csv", rows)
    title = (
        "Fine-tuning one layer of RoBERTa-base, by depth "
        "(batch of 16 × 64 tokens, one CPU core, "
        f"means of {_least_and_most(rows)} steps, no dropout)"
    )
    options.page.save(
        lambda page: plots.depth_figure(rows, page), options.out / "fig4a", title
    )


def _least_and_most(rows: Sequence[Row]) -> str:
    counts = sorted({int(row["steps"]) for row in rows})
    return "–".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))


def fig4b(options: Options) -> None:
    """Memory of a device, alone and in cooperation."""
    rows = depth.memory_rows(options.draws)
    write_csv(options.out / "fig4b.csv", rows)
    title = "Memory to fine-tune RoBERTa-base, 64 tokens (cost model, no dropout)"
    options.page.save(
        lambda page: plots.memory_figure(rows, page), options.out / "fig4b", title
    )


def fig5a(options: Options) -> None:
    """Latency against transmit SNR, CoLA."""
    _against_snr(options, "fig5a", "CoLA", sequence_length=64)


def fig5b(options: Options) -> None:
    """Latency against transmit SNR, MRPC."""
    _against_snr(options, "fig5b", "MRPC", sequence_length=128)


def devices(options: Options) -> None:
    """Latency against the number of devices."""
    settings = [latency.Setting(num_devices=number) for number in _DEVICES]
    title = "RoBERTa-base on CoLA, N = 12 blocks, 20 MHz, mean SNR 0–20 dB by device"
    _latency_figure(options, "devices", settings, "devices", title)


def bandwidth(options: Options) -> None:
    """Latency against the uplink bandwidth."""
    settings = [latency.Setting(bandwidth_hz=1e6 * mhz) for mhz in _BANDWIDTH_MHZ]
    title = "RoBERTa-base on CoLA, K = 20, N = 12 blocks, mean SNR 0–20 dB by device"
    _latency_figure(options, "bandwidth", settings, "bandwidth_mhz", title)


def learning_curves(options: Options) -> None:
    """Learning curves against wireless time."""
    runs = learning.run_all(
        options.learning, learning.METHODS, options.out / "learning-runs"
    )
    curves, ends = outcomes.curve_rows(runs), outcomes.outcome_rows(runs)
    table = outcomes.outcome_table(ends)
    write_csv(options.out / "learning.csv", curves)
    write_csv(options.out / "learning_outcomes.csv", ends)
    _print_table(options.out / "learning_outcomes.md", table)
    options.page.save(
        lambda page: plots.learning_figure(curves, list(learning.METHODS), page),
        options.out / "learning",
        _learning_title(options.learning),
    )


def rotation(options: Options) -> None:
    """Rotation on one-sided data, at equal wireless time."""
    task = options.learning.tasks[0]
    # With as many devices as blocks there is nobody to rotate with.
    setting = replace(options.learning, num_devices=_ROTATION_DEVICES)
    runs = learning.run_all(
        setting,
        learning.ROTATIONS,
        options.out / "rotation-runs",
        tasks=[task],
    )
    curves, comparison = outcomes.curve_rows(runs), outcomes.rotation_rows(runs)
    write_csv(options.out / "rotation.csv", curves)
    write_csv(options.out / "rotation_equal_time.csv", comparison)
    _print_table(
        options.out / "rotation_equal_time.md", outcomes.rotation_table(comparison)
    )
    names = list(learning.ROTATIONS)
    options.page.save(
        lambda page: plots.learning_figure(curves, names, page, log_time=False),
        options.out / "rotation",
        f"Dirichlet(0.3) split: {_learning_title(setting)}",
    )


FIGURES: Mapping[str, Callable[[Options], None]] = {
    "4a": fig4a,
    "4b": fig4b,
    "5a": fig5a,
    "5b": fig5b,
    "devices": devices,
    "bandwidth": bandwidth,
    "learning": learning_curves,
    "rotation": rotation,
}


def _against_snr(
    options: Options, name: str, task: str, *, sequence_length: int
) -> None:
    base = latency.Setting(sequence_length=sequence_length)
    settings = [replace(base, transmit_snr_db=snr_db) for snr_db in _SNR_DB]
    title = (
        f"RoBERTa-base on {task} (16 × {sequence_length} tokens), K = 20 devices, "
        "N = 12 blocks, 20 MHz, Rayleigh fading"
    )
    points = _latency_figure(options, name, settings, "transmit_snr_db", title)
    table = summary.reduction_table(points)
    write_csv(options.out / f"{name}_reductions.csv", table)
    notes = [
        f"exact is at least {summary.TARGET_REDUCTION:.0%} below {what} at "
        f"{_listed_db(summary.points_at_target(points, 'transmit_snr_db', baselines))}"
        for what, baselines in (
            (
                "the better of random and greedy with equal shares",
                _EQUAL_SHARE_BASELINES,
            ),
            ("CRUNCH with equal shares", ("crunch",)),
        )
    ]
    _print_table(options.out / f"{name}_reductions.md", table, notes)


def _latency_figure(
    options: Options,
    name: str,
    settings: Sequence[latency.Setting],
    x: str,
    title: str,
) -> list[Row]:
    """Simulate, write and draw one figure; return its summary."""
    rows = latency.simulate(settings, options.draws)
    points = summary.summarize(rows, x)
    write_csv(options.out / f"{name}.csv", rows)
    write_csv(options.out / f"{name}_summary.csv", points)
    least = min(int(point["draws"]) for point in points)
    full = [row for row in rows if row["allocator"] == "fedavg-full"]
    excluded = sum(numbers(full, "excluded")) / sum(numbers(full, "devices"))
    title = (
        f"{title}\n{_OUR_CHOICE}; at least {least} draws a point\n"
        f"FedAvg-full leaves out {excluded:.0%} of the devices for want of memory"
    )
    options.page.save(
        lambda page: plots.latency_figure(points, x, page), options.out / name, title
    )
    return points


def _learning_title(setting: learning.LearningSetting) -> str:
    what = (
        "embedded acceptability task (no GLUE data given)"
        if setting.glue is None
        else "GLUE"
    )
    return (
        f"{setting.model} on {what},\n{setting.num_devices} devices; "
        f"mean and range of {setting.seeds} seeds"
    )


def _listed_db(points: Sequence[float]) -> str:
    return ", ".join(f"{point:g}" for point in points) + " dB" if points else "no SNR"


def _print_table(path: Path, table: Sequence[Row], notes: Sequence[str] = ()) -> None:
    text = "\n".join([markdown_table(table), "", *(f"- {note}" for note in notes)])
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)


def main() -> int:
    """Make the figures that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=local_path, default=Path("runs/figures"))
    parser.add_argument(
        "--only", nargs="+", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES)
    )
    parser.add_argument("--fleets", type=int, default=60, help="latency: random fleets")
    parser.add_argument(
        "--glue", type=local_path, help="learning: directory with GLUE data"
    )
    parser.add_argument("--seeds", type=int, default=3, help="learning: runs of each")
    parser.add_argument("--rounds", type=int, default=30, help="learning: rounds")
    parser.add_argument("--model", default="minilm-l6", help="learning: model")
    pages.add_page_options(parser)
    arguments = parser.parse_args()
    options = Options(
        out=arguments.out,
        fleets=arguments.fleets,
        learning=learning.LearningSetting(
            glue=arguments.glue,
            seeds=arguments.seeds,
            rounds=arguments.rounds,
            model=arguments.model,
        ),
        page=pages.page_of(arguments),
    )
    for name in arguments.only or FIGURES:
        start = time.perf_counter()
        print(f"figure {name} ...", flush=True)
        try:
            FIGURES[name](options)
        except (UserError, learning.RunFailed) as error:
            print(f"error: {error}")
            return 1
        print(f"figure {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
