"""The figures' rows, their CSV and PNG, and the reuse of finished runs."""

from __future__ import annotations

import csv
import json
import tomllib
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from matplotlib.image import imread
from matplotlib.text import Text

from lola_flwr.allocation import ALLOCATORS
from lola_flwr.simulation import FinishedRun
from simulations.figures import depth, latency, learning, outcomes, plots, summary
from simulations.figures.pages import SCREEN, Page
from simulations.figures.tables import markdown_table, write_csv

DRAWS = latency.draws(3, rounds=2)
SNRS_DB = (0.0, 20.0)
SETTINGS = [latency.Setting(transmit_snr_db=snr_db) for snr_db in SNRS_DB]


@pytest.fixture(scope="module")
def rows():
    return latency.simulate(SETTINGS, DRAWS)


@pytest.fixture(scope="module")
def points(rows):
    return summary.summarize(rows, "transmit_snr_db")


def assert_drawn(draw, path):
    SCREEN.save(draw, path, "title")
    pixels = imread(path.with_suffix(".png"))[:, :, :3]
    background = pixels[0, 0]
    # Less would be a title on an empty page.
    assert (pixels != background).any(axis=2).mean() > 0.03


def assert_fits_a_column(draw, path):
    """Draw for a paper; return the figure."""
    drawn = []
    page = Page(is_paper=True, format="pdf")
    page.save(lambda p: drawn.append(draw(p)) or drawn[0], path, "what it shows")
    (figure,) = drawn
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert path.with_suffix(".txt").read_text() == "what it shows\n"
    assert figure.get_figwidth() == 3.5
    assert figure.get_suptitle() == ""
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert len(texts) > 10
    assert min(text.get_fontsize() for text in texts) >= 7.0
    # Nothing reaches beyond the page: it was laid out for it.
    box = figure.get_tightbbox()
    assert box.x0 >= -0.05 and box.x1 <= 3.55
    for axes in figure.axes:
        # Nor does a label beyond its own panel.
        height = axes.get_window_extent().height
        assert axes.yaxis.label.get_window_extent().height <= 1.25 * height
    assert {axes.get_xscale() for axes in figure.axes} == {"linear"}
    assert {axes.get_yscale() for axes in figure.axes} == {"linear"}
    return figure


class TestLatency:
    def test_all_contenders_meet_the_same_draws(self, rows):
        met = defaultdict(list)
        for row in rows:
            met[row["allocator"]].append(
                (row["transmit_snr_db"], row["fleet"], row["round"])
            )
        everything = [
            (snr_db, draw.fleet, draw.server_round)
            for snr_db in SNRS_DB
            for draw in DRAWS
        ]
        assert dict(met) == dict.fromkeys(latency.CONTENDERS, everything)

    def test_exact_is_never_above_another_allocator(self, rows):
        by_draw = defaultdict(dict)
        for row in rows:
            key = (row["transmit_snr_db"], row["fleet"], row["round"])
            by_draw[key][row["allocator"]] = row["round_s"]
        for latencies in by_draw.values():
            for name in ALLOCATORS:
                assert latencies["exact"] <= latencies[name] * (1 + 1e-9)
            for plain in ("crunch", "random", "fedavg-full"):
                shared = latencies[f"{plain}+shares"]
                assert shared <= latencies[plain] * (1 + 1e-9)

    def test_draws_depend_on_their_seeds_alone(self, rows):
        assert latency.simulate(SETTINGS, DRAWS) == rows
        alone = latency.simulate(SETTINGS[1:], DRAWS[-1:])
        assert alone == rows[-len(alone) :]

    def test_fading_is_the_same_at_every_snr(self):
        # At low SNR the rate is proportional to it: 10 dB are a factor of 10.
        upload_s = [
            latency.stated_draw(
                latency.Setting(transmit_snr_db=snr_db), DRAWS[0], merged=False
            ).problem.full_band_upload_s
            for snr_db in (-60.0, -50.0)
        ]
        np.testing.assert_allclose(upload_s[0] / upload_s[1], 10.0, rtol=1e-3)

    def test_devices_without_memory_for_the_whole_model_are_counted(self):
        setting = latency.Setting(sequence_length=128)
        needed = latency.block_costs(128, 16, merged=True).memory_bytes[0]
        for row in latency.simulate([setting], DRAWS[:1]):
            fleet = latency.draw_fleet(row["fleet"], row["devices"])
            small = sum(device.memory_bytes < needed for device in fleet)
            assert small > 0
            expected = small if row["allocator"].startswith("fedavg") else 0
            assert row["excluded"] == expected

    def test_an_infeasible_draw_is_left_out_for_all(self):
        # No device can hold so much.
        assert latency.simulate([latency.Setting(batch_size=4096)], DRAWS[:1]) == []


class TestSummary:
    def test_means_and_reductions(self, rows, points):
        for point in points:
            values, exact = (
                np.array(
                    [
                        row["round_s"]
                        for row in rows
                        if row["allocator"] == name
                        and row["transmit_snr_db"] == point["transmit_snr_db"]
                    ]
                )
                for name in (point["allocator"], "exact")
            )
            assert point["draws"] == len(DRAWS)
            assert point["mean_s"] == pytest.approx(values.mean())
            assert point["mean_low_s"] <= point["mean_s"] <= point["mean_high_s"]
            assert point["exact_reduction"] == pytest.approx(
                1 - exact.mean() / values.mean()
            )
            assert point["exact_reduction_median"] == pytest.approx(
                np.median(1 - exact / values)
            )

    def test_points_at_target(self):
        # Against the better baseline: 1 - 5/10 at 0 dB, 1 - 7/10 at 10 dB.
        points = [
            {"snr": snr, "allocator": name, "mean_s": mean_s}
            for snr, means in ((0.0, (5.0, 10.0, 99.0)), (10.0, (7.0, 99.0, 10.0)))
            for name, mean_s in zip(("exact", "random", "greedy"), means, strict=True)
        ]
        baselines = ("random", "greedy")
        assert summary.points_at_target(points, "snr", baselines) == [0.0]

    def test_table_spans_the_points(self, points):
        table = {row["baseline"]: row for row in summary.reduction_table(points)}
        assert set(table) == set(latency.CONTENDERS) - {"exact"}
        reductions = [
            100 * point["exact_reduction"]
            for point in points
            if point["allocator"] == "random"
        ]
        line = table["random"]
        assert line["exact: least %"] == pytest.approx(min(reductions), abs=0.05)
        assert line["exact: most %"] == pytest.approx(max(reductions), abs=0.05)
        assert line["exact: mean %"] == pytest.approx(np.mean(reductions), abs=0.05)


class TestDepth:
    @pytest.mark.slow
    def test_measures_every_depth_and_the_whole_model(self, tmp_path):
        threads, lines = torch.get_num_threads(), []
        rows = depth.depth_rows(
            model_name="random:roberta-tiny",
            batch_size=2,
            sequence_length=16,
            least=2,
            most=2,
            report=lines.append,
        )
        assert torch.get_num_threads() == threads
        assert [row["steps"] for row in rows] == [2] * 5
        assert len(lines) == 5
        assert [row["depth"] for row in rows] == [1, 2, 3, 4, depth.WHOLE_MODEL]
        for key in ("saved_bytes", "model_saved_bytes", "model_flops"):
            values = [row[key] for row in rows]
            assert values == sorted(values), key
        for row in rows:
            assert row["saved_with_dropout_bytes"] > row["saved_bytes"]
        # The cost model's speed is fitted to the sum of all that was measured.
        measured_s = sum(row["forward_s"] + row["backward_s"] for row in rows)
        assert sum(row["model_s"] for row in rows) == pytest.approx(measured_s)
        draw = partial(plots.depth_figure, rows)
        assert_drawn(draw, tmp_path / "depth")
        assert_fits_a_column(draw, tmp_path / "depth")
        # Bars have their spread on top.
        left, _ = draw(SCREEN).axes
        (bars,) = (c for c in left.containers if isinstance(c, ErrorbarContainer))
        assert len(bars.lines[2][0].get_segments()) == 5

    def test_steps_are_repeated_until_their_spread_is_small(self):
        seconds = {
            "steady": cycle([1.0]),
            "jumpy": cycle([1.0, 1.2]),
            "wild": cycle([1.0, 9.0]),
        }
        lines = []
        timed = depth.repeated(
            {
                name: lambda values=values: (next(values), 1.0)
                for name, values in seconds.items()
            },
            spread=0.02,
            least=3,
            most=25,
            report=lines.append,
        )
        counts = {name: len(found.steps_s) for name, found in timed.items()}
        assert counts["steady"] == 3
        assert 3 < counts["jumpy"] < 25
        assert counts["wild"] == 25
        for name in ("steady", "jumpy"):
            assert timed[name].spread <= 0.02
        before = depth.Timed(timed["jumpy"].steps_s[:-1])
        assert before.spread > 0.02
        assert [line.split(":")[0] for line in lines] == [
            f"  depth {name}" for name in ("steady", "jumpy", "wild")
        ]
        steps_s = timed["jumpy"].steps_s.sum(axis=1)
        assert timed["jumpy"].deviation_s == pytest.approx(np.std(steps_s, ddof=1))

    def test_cooperation_needs_the_mean_block(self, tmp_path):
        rows = depth.memory_rows(DRAWS[:2], batch_sizes=(4, 16))
        assert [row["fine_tuning"] for row in rows] == ["alone", "cooperating"] * 2
        costs = latency.block_costs(64, 16, merged=False)
        # One device a block: the mean over active devices is that over blocks.
        assert rows[3]["mean_bytes"] == pytest.approx(costs.memory_bytes.mean())
        assert rows[3]["largest_bytes"] == costs.memory_bytes.max()
        for row in rows:
            parts = ("weights_bytes", "gradients_bytes", "activations_bytes")
            assert sum(row[part] for part in parts) == pytest.approx(row["mean_bytes"])
        assert_drawn(partial(plots.memory_figure, rows), tmp_path / "memory")
        assert_fits_a_column(partial(plots.memory_figure, rows), tmp_path / "memory")


class TestOutput:
    def test_csv_equals_rows(self, rows, tmp_path):
        path = tmp_path / "new" / "rows.csv"
        write_csv(path, rows)
        with path.open(newline="") as file:
            read = list(csv.DictReader(file))
        # repr of a float, which csv writes, reads back as the same float.
        assert read == [{key: str(row[key]) for key in row} for row in rows]
        assert [float(row["round_s"]) for row in read] == [r["round_s"] for r in rows]

    def test_every_contender_has_a_style_of_its_own(self):
        assert set(latency.CONTENDERS) <= set(plots.STYLES)
        looks = [(s.color, s.marker, s.line) for s in plots.STYLES.values()]
        assert len(set(looks)) == len(looks)
        assert set(learning.METHODS) | set(learning.ROTATIONS) <= set(plots.STYLES)

    def test_latency_figure(self, points, tmp_path):
        draw = partial(plots.latency_figure, points, "transmit_snr_db")
        assert_drawn(draw, tmp_path / "latency")
        left, right = draw(SCREEN).axes
        assert len(left.lines) == len(latency.CONTENDERS)
        # The exact optimum is not compared with itself; the target is a line, too.
        assert len(right.lines) == len(latency.CONTENDERS)
        paper = assert_fits_a_column(draw, tmp_path / "latency")
        region_s = [p["mean_s"] for p in points if p["allocator"] == plots.REGION]
        assert paper.axes[0].get_ylim() == pytest.approx((0, 1.05 * max(region_s)))

    def test_markdown(self):
        table = markdown_table([{"name": "a", "value": 1.5}])
        assert table == "| name | value |\n| :-- | --: |\n| a | 1.5 |"


TINY = learning.LearningSetting(
    seeds=2, rounds=4, eval_every=2, model="random:roberta-tiny"
)


def fabricated_records(config, *, round_s):
    """Round log of a run: block 0 to 3 each round, evaluated every second one."""
    blocks = [{"block_index": index, "status": "accepted"} for index in range(4)]
    if config["method"] == "fedavg-full":
        blocks = [{"block_index": 0, "status": "accepted"} for _ in range(6)]
    return [
        {
            "server_round": number,
            "round_s": round_s,
            "bound_s": round_s / (1 + config["rotation-eps"] / 2),
            "wireless_s": number * round_s,
            "blocks": blocks,
            "metrics": (
                {"loss": 1.0 / number, "matthews": 0.1 * number}
                if number % config["eval-every"] == 0
                else {}
            ),
        }
        for number in range(1, config["rounds"] + 1)
    ]


class FakeApp:
    """Stands in for `run_app`: writes a round log and remembers what was asked for."""

    def __init__(self, *, status="finished:completed", stop_after=None):
        self.configs = []
        self.devices = []
        self._status, self._stop_after = status, stop_after

    def __call__(self, app, *, num_devices, run_config, home):
        overrides = tomllib.loads("\n".join(run_config))
        config = {**learning.app_config(), **overrides}
        self.configs.append(config)
        self.devices.append(num_devices)
        slower = 1.1 if config["rotation-eps"] else 1.0
        records = fabricated_records(config, round_s=2.0 * slower)
        lines = [json.dumps(record) + "\n" for record in records[: self._stop_after]]
        directory = Path(config["output-dir"])
        (directory / "rounds.jsonl").write_text("".join(lines))
        return FinishedRun(self._status, "ERROR :     error: no such luck\n")


def run_all(directory, app, setting=TINY, methods=learning.METHODS):
    return learning.run_all(
        setting, methods, directory, launch=app, report=lambda line: None
    )


class TestReuse:
    def test_a_finished_run_is_not_repeated(self, tmp_path):
        first, again = FakeApp(), FakeApp()
        runs = run_all(tmp_path, first)
        assert len(first.configs) == TINY.seeds * len(learning.METHODS)
        assert set(first.devices) == {6}
        assert [config["seed"] for config in first.configs] == [0] * 4 + [1] * 4
        assert {config["task"] for config in first.configs} == {"acceptability"}
        assert run_all(tmp_path, again) == runs
        assert again.configs == []

    def test_an_interrupted_series_goes_on(self, tmp_path):
        runs = run_all(tmp_path, FakeApp())
        log = tmp_path / "acceptability-crunch-seed1" / "rounds.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        for left_over in ("".join(lines[:-1]), "".join(lines)[:-5], ""):
            log.write_text(left_over)
            again = FakeApp()
            assert run_all(tmp_path, again) == runs
            assert [(c["allocator"], c["seed"]) for c in again.configs] == [
                ("crunch", 1)
            ]

    def test_another_configuration_is_run_anew(self, tmp_path, monkeypatch):
        run_all(tmp_path, FakeApp())
        longer = replace(TINY, rounds=6)
        again = FakeApp()
        runs = run_all(tmp_path, again, longer)
        assert len(again.configs) == 8
        assert all(len(run.records) == 6 for run in runs)
        # A default of the app that changed makes another run, too.
        config = {**learning.app_config(), "lr": 1.0}
        monkeypatch.setattr(learning, "app_config", lambda: config)
        changed = FakeApp()
        run_all(tmp_path, changed, longer)
        assert len(changed.configs) == 8
        # A key that is new says nothing of runs before it.
        monkeypatch.setattr(learning, "app_config", lambda: {**config, "new": 0})
        as_before = FakeApp()
        run_all(tmp_path, as_before, longer)
        assert as_before.configs == []

    def test_a_stopped_run_finds_what_it_left(self, tmp_path):
        run_all(tmp_path, FakeApp())
        directory = tmp_path / "acceptability-exact-seed0"
        log = directory / "rounds.jsonl"
        log.write_text(log.read_text().splitlines(keepends=True)[0])
        (directory / "checkpoints").mkdir()
        found = []

        class Resumed(FakeApp):
            def __call__(self, app, **arguments):
                found.append((directory / "checkpoints").is_dir())
                return super().__call__(app, **arguments)

        run_all(tmp_path, Resumed())
        assert found == [True]
        # Of another configuration nothing is left.
        (directory / "checkpoints").mkdir()
        run_all(tmp_path, Resumed(), replace(TINY, rounds=6))
        assert found[1] is False

    def test_a_run_is_complete_at_its_target(self, tmp_path):
        def complete(records, **changes):
            config = {**learning.app_config(), "rounds": 3, "target": "", **changes}
            (tmp_path / "config.json").write_text(json.dumps(config))
            lines = [
                json.dumps({"server_round": r, "metrics": m}) + "\n"
                for r, m in enumerate(records, start=1)
            ]
            (tmp_path / "rounds.jsonl").write_text("".join(lines))
            return learning.reusable_records(tmp_path, config) is not None

        low, high = {"f1": 0.6}, {"f1": 0.8}
        assert complete([{}, {}, low])
        assert not complete([{}, high])
        assert complete([{}, high], target="f1>=0.7")
        assert not complete([{}, low], target="f1>=0.7")
        assert complete([{}, {}, low], target="f1>=0.7")
        assert not complete([], target="f1>=0.7")

    @pytest.mark.parametrize(
        "app", [FakeApp(status="finished:failed"), FakeApp(stop_after=2)]
    )
    def test_a_failed_run_is_reported_and_not_reused(self, tmp_path, app):
        with pytest.raises(learning.RunFailed, match="exact-seed0: no such luck"):
            run_all(tmp_path, app)
        good = FakeApp()
        run_all(tmp_path, good)
        assert len(good.configs) >= TINY.seeds * len(learning.METHODS) - 1


class TestLearning:
    @pytest.mark.slow
    def test_curves_and_outcomes(self, tmp_path):
        runs = run_all(tmp_path, FakeApp())
        curves = outcomes.curve_rows(runs)
        assert len(curves) == 2 * len(runs)
        assert {row["metric"] for row in curves} == {"matthews"}
        assert [row["wireless_s"] for row in curves[:2]] == [4.0, 8.0]
        ends = outcomes.outcome_rows(runs)
        block, *_, whole = ends[:4]
        assert (block["method"], whole["method"]) == ("exact", "fedavg-full+shares")
        assert block["final"] == pytest.approx(0.4)
        # 4 blocks or 6 devices, 4 rounds, the app's batch.
        batch = learning.LearningSetting().overrides("cola", 0)["batch-size"]
        assert (block["samples"], whole["samples"]) == (16 * batch, 24 * batch)
        assert whole["mean_memory_bytes"] > block["largest_memory_bytes"]
        assert block["largest_memory_bytes"] > block["mean_memory_bytes"]
        (line, *_) = outcomes.outcome_table(ends)
        assert line["final"] == "0.4000 ± 0.0000"
        draw = partial(plots.learning_figure, curves, list(learning.METHODS))
        assert_drawn(draw, tmp_path / "learning")

    def test_a_paper_shows_time_until_all_but_the_slowest_end(self, tmp_path):
        rows = [
            {
                **{"task": "cola", "method": method, "seed": seed, "metric": "f1"},
                **{"server_round": r, "wireless_s": r * step_s, "value": 0.2 * r},
            }
            for method, step_s in (("exact", 2.0), ("fedavg-full+shares", 50.0))
            for seed in range(2)
            for r in range(1, 5)
        ]
        names = ["exact", "fedavg-full+shares"]
        draw = partial(plots.learning_figure, rows, names)
        figure = assert_fits_a_column(draw, tmp_path / "learning")
        (axes,) = figure.axes
        assert axes.get_xlim() == pytest.approx((0.0, 1.25 * 8.0))
        assert [text.get_text() for text in axes.texts] == ["at 200 s"]

    def test_a_mean_is_one_of_all_seeds(self):
        rows = [
            {"seed": seed, "server_round": r, "wireless_s": 2.0 * r + seed, "value": v}
            for seed, values in enumerate(([0.1, 0.5, 0.9], [0.3, 0.7]))
            for r, v in enumerate(values, start=1)
        ]
        np.testing.assert_allclose(
            plots.mean_curve(rows), [[2.5, 0.2, 0.1, 0.3], [4.5, 0.6, 0.5, 0.7]]
        )

    def test_rotation_is_compared_at_equal_wireless_time(self, tmp_path):
        runs = run_all(tmp_path, FakeApp(), methods=learning.ROTATIONS)
        comparison = outcomes.rotation_rows(runs)
        plain, rotated = comparison[:2]
        # The plain run ends at 8 s; the rotated one, at 2.2 s a round, is then in its
        # fourth round, and was evaluated after its second.
        assert plain["budget_s"] == rotated["budget_s"] == 8.0
        assert (plain["server_round"], rotated["server_round"]) == (4, 2)
        assert plain["largest_excess"] == 0.0
        assert rotated["largest_excess"] == pytest.approx(0.1)
        assert [row["seeds"] for row in outcomes.rotation_table(comparison)] == [2, 2]
