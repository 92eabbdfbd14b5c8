"""The report's data and page; `test_browser` opens it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lola_flwr.allocation import RoundMode
from lola_flwr.cli.main import main
from lola_flwr.errors import UserError
from lola_flwr.report import Report, Run
from lola_flwr.report.targets import cost_columns
from lola_flwr.run.directory import describe_run
from lola_flwr.run.records import StepRecord
from lola_flwr.run.round_log import RoundLog
from lola_flwr.run.target import Target
from tests.report.sample_runs import HOSTILE, LOST, sample_run


class Page(HTMLParser):
    """What of a page matters here: attributes by tag, and each script's text."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.scripts = []
        self.words = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data.strip())


@pytest.fixture(scope="module")
def runs():
    return [sample_run("exact"), sample_run("crunch")]


@pytest.fixture(scope="module")
def text(runs):
    return Report(runs).html()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def write_run(directory, run):
    log = RoundLog(directory / "rounds.jsonl")
    for record in run.rounds:
        log.append(record)
    describe_run(directory, app="app", config=run.config)
    return directory


def test_nothing_is_fetched(page, text):
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        if tag == "link":
            assert attributes["href"].startswith("data:")
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_what_a_device_calls_itself_is_no_markup(page):
    assert len(page.scripts) == 3
    assert not any("onclick" in attributes for _, attributes in page.elements)
    (exact, _) = json.loads(page.scripts[0])
    assert HOSTILE[:64] in exact["devices"]
    assert HOSTILE in page.words


def test_data_are_the_rounds(page, runs):
    for shown, run in zip(json.loads(page.scripts[0]), runs, strict=True):
        assert shown["round"] == [record.server_round for record in run.rounds]
        assert shown["planned_s"] == [
            None if r.skipped else pytest.approx(r.round_s, rel=1e-5)
            for r in run.rounds
        ]
        assert shown["metrics"]["accuracy"] == [
            pytest.approx(r.metrics["accuracy"], rel=1e-5) if r.metrics else None
            for r in run.rounds
        ]
        for index, record in enumerate(run.rounds):
            parts = range(shown["first"][index], shown["first"][index + 1])
            assert [
                (shown["devices"][shown["device"][p]], shown["block"][p]) for p in parts
            ] == [(block.device, block.block_index) for block in record.blocks]
            assert [shown["statuses"][shown["status"][p]] == LOST for p in parts] == [
                block.status == LOST for block in record.blocks
            ]
        parts = [block for record in run.rounds for block in record.blocks]
        used = [part for part in parts if part.status == "accepted"]
        assert {
            (shown["devices"][d], b): n for d, b, n in shown["meetings"]
        } == Counter((part.device, block) for part in used for block in part.blocks)
        assert {shown["devices"][d]: needed for d, needed, *_ in shown["memory"]} == {
            device: pytest.approx(
                max(p.required_memory_bytes for p in parts if p.device == device),
                rel=1e-5,
            )
            for device in {part.device for part in parts}
        }


def test_a_long_run_keeps_its_peaks(monkeypatch):
    run = sample_run("long", num_devices=8, num_rounds=120)
    slow = replace(run.rounds[77], observed_s=1e4)
    run = replace(run, rounds=[*run.rounds[:77], slow, *run.rounds[78:]])
    monkeypatch.setattr("lola_flwr.report.page.MOST_ROUNDS", 60)
    monkeypatch.setattr("lola_flwr.report.page.MOST_PARTS", 100)
    text = Report([run]).html()
    (shown,) = json.loads(Page(text).scripts[0])
    all_of_it = run.columns()
    assert shown["num_rounds"] == 120
    assert len(shown["round"]) <= 60
    assert len(shown["device"]) <= 100
    for name in ("planned_s", "observed_s"):
        known = [[v for v in of[name] if v is not None] for of in (shown, all_of_it)]
        assert len({(min(values), max(values)) for values in known}) == 1
    peak = shown["observed_s"].index(1e4)
    assert peak in shown["detailed"]
    assert shown["first"][peak + 1] - shown["first"][peak] == len(slow.blocks)
    # What is counted is counted over all rounds.
    for name in ("meetings", "memory", "devices"):
        assert shown[name] == all_of_it[name]
    said = f"of 120 rounds the charts show {len(shown['round'])}, "
    assert said in text
    assert f"{len(shown['detailed'])} are shown device by device" in text
    assert "rounds.jsonl" in text


def test_of_too_many_devices_none_is_shown(monkeypatch):
    monkeypatch.setattr("lola_flwr.report.runs.MOST_DEVICES", 3)
    text = Report([sample_run("wide", num_rounds=2)]).html()
    (shown,) = json.loads(Page(text).scripts[0])
    assert not any(shown[name] for name in ("device", "devices", "meetings", "memory"))
    assert "too many devices" in text


@pytest.mark.slow
def test_five_thousand_rounds_of_a_hundred_devices(tmp_path):
    everyone = RoundMode(participation="all")
    run = sample_run("big", num_devices=100, num_rounds=12, mode=everyone)
    with (tmp_path / "rounds.jsonl").open("w") as file:
        for number in range(1, 5001):
            record = run.rounds[-(number % 8) - 1]
            file.write(replace(record, server_round=number).to_json() + "\n")
    code = (
        "import sys; from lola_flwr.cli.main import main; "
        "assert main(['report', sys.argv[1]]) == 0; "
        "from lola_flwr.machine.memory import peak_memory_bytes; "
        # Not of getrusage, whose peak is the parent's, too.
        "print(peak_memory_bytes())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 500e6
    assert (tmp_path / "report.html").stat().st_size < 5e6


def test_tables_can_be_read_without_charts(page, runs):
    refused = sum(runs[0].refused.values())
    assert refused > 0
    assert str(refused) in page.words
    assert "not finite" in page.words
    assert "too few devices" not in page.words  # said where the round is chosen


def test_configurations_stand_side_by_side(text):
    before_allocator = text[: text.index('<th scope="row">allocator')]
    assert before_allocator.endswith('<tr class="differs">')
    before_rounds = text[: text.index('<th scope="row">rounds')]
    assert before_rounds.endswith("<tr>")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/ada/runs/first", "…/first"),
        ("~/models/mine", "…/mine"),
        ("random:/home/ada/model", "random:…/model"),
        ("sentence-transformers/all/x", "sentence-transformers/all/x"),
        ("runs/first", "runs/first"),
        (0.5, 0.5),
    ],
)
def test_a_path_does_not_tell_whose_it_is(value, shown):
    run = replace(sample_run("a", num_rounds=1), description={"config": {"x": value}})
    assert f'<th scope="row">x</th><td>{shown}</td>' in Report([run]).html()


def test_runs_of_one_name_are_numbered(runs):
    page = Page(Report([runs[0], runs[0]]).html())
    assert [run["name"] for run in json.loads(page.scripts[0])] == [
        "exact (1)",
        "exact (2)",
    ]


def test_a_hundred_rounds_of_fifty_devices_stay_small():
    everyone = RoundMode(participation="all")
    run = sample_run("big", num_devices=50, num_rounds=100, mode=everyone)
    # Who would take an hour for its block is not asked, and nobody is in round 3.
    active = [len(record.blocks) for record in run.rounds]
    assert active == [record.num_devices for record in run.rounds[:2]] + [0] + [
        record.num_devices for record in run.rounds[3:]
    ]
    assert 98 * 50 < sum(active) <= 99 * 50
    assert len(Report([run]).html().encode()) < 5e6


def facts(run):
    """Return what the page's second table says of a run."""
    (table,) = re.findall(
        r'<table class="runs facts">(.*?)</table>', Report([run]).html(), re.DOTALL
    )
    return dict(re.findall(r'data-label="(.*?)">(.*?)</td>', table))


def test_what_a_run_was_is_summed_up(runs):
    config = {"rounds": 12, "latency-target-s": 1000.0}
    versions = {"lola-flwr": "0.1.0", "flwr": "1.41.0", "torch": "2.13.0", "x": "1"}
    started = "2026-11-28T21:30:05+00:00"
    description = {"config": config, "versions": versions, "started": started}
    run = replace(runs[0], description=description)
    assert facts(run) == {
        "started": "2026-11-28 21:30 UTC",
        # A round that was skipped tells no time.
        "rounds took here": "16.5 s",
        "finished": "yes",
        "latency target": "1000 s a round: not reached, 11 of 12 rounds within it",
        "versions": "lola-flwr 0.1.0, flwr 1.41.0, torch 2.13.0",
    }


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.25, "0.25 s"), (75, "1 min 15 s"), (7400, "2 h 3 min")]
)
def test_a_duration_is_said_in_its_largest_units(seconds, said):
    record = StepRecord(1, 4, 2.0, exchanges=1, measured_round_s=seconds)
    assert facts(Run("a", [record]))["rounds took here"] == said


@pytest.mark.parametrize(
    ("target_s", "said"),
    [
        (0.0, "none"),
        (2.0, "2 s a round: reached, 2 of 2 rounds within it"),
        (1.9, "1.9 s a round: not reached, 0 of 2 rounds within it"),
    ],
)
def test_whether_the_target_was_reached(target_s, said):
    rounds = [StepRecord(n, 4, 2.0 * n, 2.0, 2.0, exchanges=1) for n in (1, 2)]
    config = {"rounds": 3, "latency-target-s": target_s}
    told = facts(Run("a", rounds, {"config": config}))
    assert told["latency target"] == said
    assert told["finished"] == "no: 2 of 3 rounds"


def test_a_run_that_goes_on_began_when_it_began(tmp_path):
    describe_run(tmp_path, app="app", config={})
    path = tmp_path / "run.json"
    then = json.loads(path.read_text()) | {"started": "2026-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(then))
    describe_run(tmp_path, app="app", config={"rounds": 2})
    now = json.loads(path.read_text())
    assert (now["started"], now["config"]) == (then["started"], {"rounds": 2})


def test_what_a_run_started_from_is_in_the_data(page):
    for shown in json.loads(page.scripts[0]):
        assert shown["start_metrics"] == {"loss": 0.7, "accuracy": 0.5}


def test_without_figures_there_is_no_learning(page):
    rounds = [StepRecord(1, 4, 2.0, exchanges=1, train_loss=math.nan)]
    learning = [
        "learning" in [attributes.get("id") for _, attributes in shown.elements]
        for shown in (page, Page(Report([Run("a", rounds)]).html()))
    ]
    assert learning == [True, False]


def test_bytes_of_a_spread_model_are_counted():
    record = StepRecord(1, 4, 2.0, exchanges=26, sent_bytes=7, received_bytes=5)
    run = Run("spread", [record, StepRecord(2, 4, 2.0, skipped="nobody is there")])
    assert run.total_bytes("received_bytes") == 5
    assert run.total_bytes("sent_bytes") == 7
    assert run.total_bytes("payload_bytes") is None


def test_no_run_is_no_report():
    with pytest.raises(UserError, match="at least one run"):
        Report([])


def test_a_notebook_shows_it_apart_from_its_own_page(runs):
    ((tag, attributes),) = Page(Report(runs[:1])._repr_html_()).elements
    assert tag == "iframe"
    assert attributes["srcdoc"] == Report(runs[:1]).html()


class TestCommand:
    def test_one_run(self, tmp_path, runs, capsys):
        directory = write_run(tmp_path / "a", runs[0])
        assert main(["report", str(directory)]) == 0
        page = Page((directory / "report.html").read_text())
        (shown,) = json.loads(page.scripts[0])
        assert shown["name"] == "a"
        assert "Python" not in page.words
        assert "allocator" in page.words
        assert f"{directory}/report.html" in capsys.readouterr().out

    def test_several_runs(self, tmp_path, runs):
        directories = [str(write_run(tmp_path / run.name, run)) for run in runs]
        out = tmp_path / "there" / "report.html"
        assert main(["report", *directories, "--out", str(out)]) == 0
        assert len(json.loads(Page(out.read_text()).scripts[0])) == 2

    def test_the_latest_run(self, tmp_path, runs, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["report"]) == 1
        assert "There is no run in runs/" in capsys.readouterr().err
        write_run(tmp_path / "runs" / "one", runs[0])
        assert main(["report"]) == 0
        assert (tmp_path / "runs" / "one" / "report.html").exists()

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "has no rounds.jsonl"),
            ({"rounds.jsonl": ""}, "holds no round yet"),
            ({"rounds.jsonl": "x\n"}, "line 1 is no record"),
            ({"rounds.jsonl": "", "run.json": "x"}, "holds no round"),
        ],
    )
    def test_what_is_no_run(self, tmp_path, files, message, capsys):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        assert main(["report", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err

    def test_a_damaged_description(self, tmp_path, runs):
        write_run(tmp_path, runs[0])
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(UserError, match=r"run\.json cannot be read"):
            Run.read(tmp_path)


def costs_table(report):
    (table,) = re.findall(r'<section id="target">.*?<tbody>(.*?)</tbody>', report, re.S)
    return [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)
    ]


def test_targets_are_compared_by_what_they_cost(runs):
    goal = Target("accuracy", 0.6)
    (one, other) = costs_table(Report(runs, targets=[goal]).html())
    assert one[:2] == ["accuracy&gt;=0.6", "exact"] and other[1] == "crunch"
    for run, row in zip(runs, (one, other), strict=True):
        # Evaluated every second round, and 0.5 + 0.4 n / 12 by then.
        assert row[2] == "4"
        assert row[3] == f"{run.rounds[3].wireless_s:.4g} s"
        assert row[4:] == ["–", "–"]


def test_a_target_that_was_missed_says_what_the_best_was(runs):
    goal = Target("accuracy", 0.95)
    for row in costs_table(Report(runs, targets=[goal]).html()):
        assert row[2] == "not reached; its best is 0.9"


def test_without_a_target_runs_are_compared_by_what_all_came_to(runs):
    short = replace(runs[1], rounds=runs[1].rounds[:6])
    rows = costs_table(Report([runs[0], short]).html())
    assert [row[0] for row in rows] == ["accuracy&gt;=0.7"] * 2
    assert [row[2] for row in rows] == ["6", "6"]
    own = replace(runs[0], description={"config": {"target": "loss<=0.6"}})
    rows = costs_table(Report([own, runs[1]]).html())
    assert [row[0] for row in rows] == ["loss&lt;=0.6"] * 2


def test_a_target_of_no_run_is_refused(runs):
    with pytest.raises(UserError, match=r"no 'f1'; it has loss, accuracy\."):
        Report(runs, targets=[Target("f1", 0.5)])


def test_the_curve_of_costs_has_what_is_better_than_all_before(runs):
    (accuracy, loss) = (cost_columns(runs[0])[m] for m in ("accuracy", "loss"))
    assert accuracy["value"][0] == 0.5 and accuracy["wireless_s"][0] == 0.0
    assert accuracy["value"] == sorted(accuracy["value"])
    assert loss["value"] == sorted(loss["value"], reverse=True)
    assert accuracy["wireless_s"] == loss["wireless_s"]
    assert accuracy["up_bytes"] == [0, *[None] * 6]
    assert set(accuracy["joules"]) == {None}


def test_energy_is_shown_where_it_is_known(runs):
    goal = Target("accuracy", 0.6)
    assert "energy" not in Report(runs, targets=[goal]).html()
    rounds = [replace(r, joules=2000.0 * r.server_round) for r in runs[0].tally.rounds]
    told = replace(runs[0], rounds=rounds)
    page = Report([told, runs[1]], targets=[goal]).html()
    assert page.count('data-label="energy">24 kJ<') == 1
    assert [row[-1] for row in costs_table(page)] == ["8 kJ", "–"]
    assert '<option value="joules">energy (J)</option>' in page
    assert cost_columns(told)["accuracy"]["joules"][-1] == 24_000.0


def test_a_run_that_ended_at_its_target_is_finished(runs):
    config = {"rounds": 40, "target": "accuracy>=0.9"}
    said = "yes, at its target: 12 of 40 rounds"
    assert said in Report([replace(runs[0], description={"config": config})]).html()
    config["target"] = "accuracy>=0.91"
    assert said not in Report([replace(runs[0], description={"config": config})]).html()
