"""The report in headless Chromium: it draws, complains about nothing, obeys keys."""

from __future__ import annotations

import csv
import math
import re
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from xml.etree import ElementTree

import pytest

from lola_flwr.planning import named_model_costs, plan_rounds
from lola_flwr.report import Report, Run
from lola_flwr.run.records import StepRecord
from lola_flwr.system.fleet_file import generate_fleet
from tests.report.chromium import chromium
from tests.report.sample_runs import HOSTILE, sample_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    runs = [
        sample_run("exact", num_devices=50, num_rounds=100),
        sample_run("crunch", num_devices=50, num_rounds=100),
    ]
    return Report(runs).save(tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def page(browser, report):
    browser.get(report.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready")
    yield browser
    assert browser.get_log("browser") == []


def find(page, selector):
    return page.find_element("css selector", selector)


def number_of(page, selector):
    return len(page.find_elements("css selector", selector))


def colors(page, selector):
    """Return how many colors a canvas shows."""
    return page.execute_script(
        """
        const canvas = document.querySelector(arguments[0]);
        const pixels = new Uint32Array(canvas.getContext("2d")
            .getImageData(0, 0, canvas.width, canvas.height).data.buffer);
        return new Set(pixels).size;
        """,
        selector,
    )


# How many pixels of a canvas have exactly the page's colors of some names.
PIXELS = """
const canvas = document.querySelector(arguments[0]);
const { data } = canvas.getContext("2d")
    .getImageData(0, 0, canvas.width, canvas.height);
const style = getComputedStyle(document.documentElement);
return arguments[1].map((name) => {
    const hex = parseInt(style.getPropertyValue(`--${name}`).trim().slice(1), 16);
    const wanted = [hex >> 16, (hex >> 8) & 255, hex & 255];
    let count = 0;
    for (let at = 0; at < data.length; at += 4) {
        count += data[at + 3] === 255 &&
            wanted.every((value, i) => data[at + i] === value);
    }
    return count;
});
"""

CANVASES = [
    *("#by-time canvas", "#by-round canvas", "#latency-chart canvas"),
    *("#by-device", "#meetings"),
]


def choose_round(page, index):
    page.execute_script(
        "const slider = document.querySelector('#slider');"
        "slider.value = arguments[0]; slider.dispatchEvent(new Event('input'))",
        index,
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_chart_is_drawn(page, theme):
    while page.execute_script("return document.documentElement.dataset.theme") != theme:
        find(page, "#theme").click()
    for canvas in CANVASES:
        assert colors(page, canvas) > 3, canvas
    assert number_of(page, "#timeline .track") == 6
    assert number_of(page, "#memory-bars .track") > 10
    background = find(page, "body").value_of_css_property("background-color")
    assert ("251" in background) == (theme == "light")


def test_the_bottleneck_is_marked(page):
    # Best shares let all devices finish together; equal shares leave one behind.
    assert number_of(page, ".slowest") == 0
    assert "all devices finish together" in find(page, "#round-title").text
    page.find_elements("css selector", "input[name=run]")[1].click()
    assert number_of(page, ".slowest") == 1
    widths = page.execute_script(
        """return [...document.querySelectorAll("#timeline [role=row]")].slice(1).map(
        (row) => [row.className.includes("slowest"), [...row.querySelectorAll(
        ".compute, .upload, .lost")].reduce((sum, bar) => sum + bar.clientWidth, 0)])"""
    )
    slowest = [width for marked, width in widths if marked]
    assert slowest == [max(width for _, width in widths)]


def test_a_skipped_round_says_why(page):
    choose_round(page, 2)
    assert "skipped, too few devices" in find(page, "#round-title").text
    assert number_of(page, "#timeline .track") == 0


def test_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    find(page, "#slider").send_keys(Keys.ARROW_RIGHT)
    assert find(page, "#round-title").text.startswith("Round 2:")
    find(page, "#next").send_keys(Keys.ENTER)
    assert find(page, "#round-title").text.startswith("Round 3:")
    find(page, "#by-device").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    said = find(page, "#cell").text
    assert ", round 2: " in said
    find(page, "#latency-chart").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert find(page, "#latency-chart .u-value").text == "3"
    legend = find(page, "#latency-chart .u-series:nth-child(2) th")
    legend.send_keys(Keys.ENTER)
    assert "u-off" in find(page, "#latency-chart .u-series:nth-child(2)").get_attribute(
        "class"
    )


def test_everything_that_acts_can_be_reached_by_tab(page):
    from selenium.webdriver.common.keys import Keys

    reached = set()
    for _ in range(60):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.switch_to.active_element.get_attribute("id"))
    assert {
        *("theme", "metric", "by-time", "by-round", "latency-chart", "previous"),
        *("slider", "next", "by-device", "meetings", "memory-bars", "timeline"),
    } <= reached


def test_a_hostile_name_stays_text(page):
    assert page.title == "lola-flwr report"
    choose_round(page, 0)
    page.execute_script("document.querySelector('#meetings').focus()")
    names = page.execute_script(
        "return JSON.parse(document.querySelector('#data').textContent)[0].devices"
    )
    assert HOSTILE[:64] in names
    assert number_of(page, "b") == 0


# What reaches beyond the window, or beyond a box that hides what is too wide.
WIDE = """
const width = document.documentElement.clientWidth;
return [...document.querySelectorAll("body *:not(.skip)")].filter((one) => {
    const box = one.getBoundingClientRect();
    const cuts = getComputedStyle(one).overflowX !== "visible";
    return box.width > 0 &&
        (box.right > width + 1 || (cuts && one.scrollWidth > one.clientWidth + 1));
}).map((one) => one.outerHTML.slice(0, 80));
"""


@contextmanager
def screen(page, width, theme="light"):
    """A window of some width, and the page in a theme."""
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        shown = "return document.documentElement.dataset.theme"
        while page.execute_script(shown) != theme:
            find(page, "#theme").click()
        yield
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_a_run_called_after_its_directory_fits(browser, tmp_path, width):
    run = sample_run("lola-glue-20261129-022023", num_devices=6, num_rounds=40)
    more = {"matthews": 0.8333, "perplexity": 1.013}
    rounds = [
        replace(r, metrics={**r.metrics, **more}) if r.metrics else r
        for r in run.rounds
    ]
    run = replace(run, rounds=rounds)
    browser.get(Report([run]).save(tmp_path / "report.html").as_uri())
    with screen(browser, width):
        assert browser.execute_script(WIDE) == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_cut_off(page, width, theme):
    with screen(page, width, theme):
        assert page.execute_script(WIDE) == []
        names = page.find_elements("css selector", "#timeline .name")
        shown = [name.text for name in names if name.get_attribute("role") == "cell"]
        assert len(set(shown)) == len(shown) > 1


@pytest.mark.parametrize(
    "names",
    [
        [f"device-{number:04d}" for number in range(30)],
        [f"greenhouse-in-the-north-{number}" for number in range(30)],
        [f"{number}-greenhouse-in-the-north" for number in range(30)],
        [f"greenhouse-{number}-in-the-north" for number in range(30)],
    ],
)
def test_short_labels_of_devices_stay_different(page, names):
    helpers = files("lola_flwr.report").joinpath("script/helpers.js").read_text()
    labels = page.execute_script(f"{helpers} return shortened(arguments[0], 16)", names)
    assert len(set(labels)) == len(names)
    assert max(map(len, labels)) <= 16


def test_the_legend_shows_last_values_until_something_is_pointed_at(page):
    last = page.execute_script(
        "return JSON.parse(document.querySelector('#data').textContent)[0]"
        ".observed_s.at(-1)"
    )
    shown = find(page, "#latency-chart .u-series:nth-child(2) .u-value").text
    assert float(shown) == pytest.approx(last, rel=1e-3)


def test_lines_that_lie_on_one_another_differ_in_dash_and_words(page):
    dashes = page.execute_script(
        """return [...document.querySelectorAll("#latency-chart .u-marker")].map(
        (marker) => getComputedStyle(marker).borderTopStyle)"""
    )
    assert dashes[1:] == ["solid", "dashed", "dotted"]
    assert "Planned and bound coincide; no" in find(page, "#coincide").text
    assert find(page, "#alike").text == "Round by round exact and crunch coincide."
    dashes = page.execute_script(
        """return [...document.querySelectorAll("#by-round .u-marker")].map(
        (marker) => getComputedStyle(marker).borderTopStyle)"""
    )
    assert dashes[1:] == ["solid", "dashed"]


def test_what_is_not_known_coincides_with_nothing(browser, tmp_path):
    rounds = [
        replace(record, bound_s=math.nan) for record in sample_run("exact").rounds
    ]
    browser.get(Report([Run("a", rounds)]).save(tmp_path / "report.html").as_uri())
    assert find(browser, "#coincide").text == ""
    assert "bound" not in find(browser, "#latency-chart").text


def test_a_model_that_is_spread_has_no_sections_of_blocks(browser, tmp_path):
    steps = [
        StepRecord(n, 4, 2.0 * n, 2.0, 2.0, 0.5, sent_bytes=7_000_000) for n in (1, 2)
    ]
    browser.get(Report([Run("a", steps)]).save(tmp_path / "report.html").as_uri())
    assert not any(
        find(browser, place).is_displayed()
        for place in ("#round", "#who", "#memory", "nav [href='#who']")
    )
    assert find(browser, "#bytes-chart .u-series:nth-child(2) .u-value").text == "7"


def test_a_long_run_is_shown_in_part(browser, tmp_path, monkeypatch):
    run = sample_run("long", num_devices=8, num_rounds=120)
    slow = replace(run.rounds[77], observed_s=1e4)
    run = replace(run, rounds=[*run.rounds[:77], slow, *run.rounds[78:]])
    monkeypatch.setattr("lola_flwr.report.page.MOST_ROUNDS", 60)
    monkeypatch.setattr("lola_flwr.report.page.MOST_PARTS", 100)
    browser.get(Report([run]).save(tmp_path / "report.html").as_uri())
    assert "of 120 rounds" in find(browser, ".left-out").text
    (shown,) = browser.execute_script(
        "return JSON.parse(document.querySelector('#data').textContent)"
    )
    # The slider has the rounds in detail, the slowest among them.
    detailed = [shown["round"][index] for index in shown["detailed"]]
    for place, number in enumerate(detailed):
        choose_round(browser, place)
        assert find(browser, "#round-title").text.startswith(f"Round {number}:")
        assert number_of(browser, "#timeline .track") > 0 or number == 3
    assert 78 in detailed
    # A point of the chart that is none of these says where its devices are.
    other = next(n for n in shown["round"] if n not in detailed)
    chart = find(browser, "#latency-chart")
    from selenium.webdriver.common.keys import Keys

    for _ in range(shown["round"].index(other)):
        chart.send_keys(Keys.ARROW_RIGHT)
    assert "rounds.jsonl" in find(browser, "#round-title").text
    assert number_of(browser, "#timeline .track") == 0
    for canvas in CANVASES:
        assert colors(browser, canvas) > 3, canvas
    assert number_of(browser, "#memory-bars .track") == len(shown["memory"])
    assert browser.get_log("browser") == []


def test_a_plan_is_called_a_plan(browser, tmp_path):
    records = plan_rounds(generate_fleet(8), named_model_costs("minilm-l6"), rounds=1)
    path = Report([Run("plan", records)]).save(tmp_path / "plan.html")
    browser.get(path.as_uri())
    text = find(browser, "body").text
    assert find(browser, "h1").text == browser.title == "lola-flwr plan"
    assert "A plan:" in text
    for word in ("observed", "accepted", "reported", "refused", "learning", "run"):
        assert not re.search(rf"\b{word}\b", text, re.IGNORECASE), word
    assert number_of(browser, "#learning, #refused") == 0
    # One point alone is seen, and both of its lines.
    shown = browser.execute_script(
        PIXELS, "#latency-chart canvas", ["compute", "bound"]
    )
    assert min(shown) > 10


@pytest.fixture
def saves(page):
    """Gives the name and the address of what is saved, or its text if it is one."""
    page.execute_script(
        """window.saved = [];
        HTMLAnchorElement.prototype.click = function () {
            window.saved.push([this.download, this.href]);
        };
        URL.createObjectURL = (blob) => { window.blob = blob; return "blob:x"; };"""
    )

    def save(selector):
        page.execute_script("arguments[0].click()", find(page, selector))
        name, address = page.execute_script("return window.saved.pop()")
        if address.startswith("data:"):
            return name, address
        return name, page.execute_async_script("window.blob.text().then(arguments[0])")

    return save


def test_every_chart_can_be_saved_as_an_image(page, saves):
    for figure in ("#learning", "#latency", "#who", "#bytes"):
        name, image = saves(f"{figure} .save")
        assert name.endswith(".png")
        assert image.startswith("data:image/png;base64,")
    for bars in ("#round", "#memory"):
        name, text = saves(f"{bars} .save")
        assert name.endswith(".svg")
        drawing = ElementTree.fromstring(text)
        tracks = number_of(page, f"{bars} .track")
        svg = "{http://www.w3.org/2000/svg}"
        assert len(drawing.findall(f"{svg}rect")) > 2 * tracks
        assert HOSTILE[:64] in [text.text for text in drawing.iter(f"{svg}text")]


def test_a_curve_is_saved_with_what_the_run_started_from(page, saves):
    name, text = saves("#by-round-figure .save:last-child")
    assert name == "Learning, against rounds.csv"
    header, start, first, *_ = csv.reader(text.splitlines())
    assert header == ["round", "exact", "crunch"]
    assert start == ["0", "0.5", "0.5"]
    assert first[0] == "2"


def test_rounds_can_be_saved(page, saves):
    name, text = saves("#table")
    assert name == "exact.csv"
    rows = list(csv.DictReader(text.splitlines()))
    run = page.execute_script(
        "return JSON.parse(document.querySelector('#data').textContent)[0]"
    )
    assert len(rows) == len(run["device"])
    assert float(rows[-1]["upload_s"]) == run["upload_s"][-1]
    assert {row["device"] for row in rows} == set(run["devices"])


def test_costs_follow_the_metric_and_the_choice(page):
    from selenium.webdriver.support.ui import Select

    def drawn():
        table = page.execute_script(
            "return document.querySelector('#cost-chart').getAttribute('aria-label')"
        )
        return table, colors(page, "#cost-chart canvas")

    label, shades = drawn()
    assert label == "value. wireless time (s) until accuracy came to a value"
    assert shades > 5
    Select(find(page, "#metric")).select_by_value("loss")
    assert drawn()[0].endswith("until loss came to a value")
    Select(find(page, "#cost")).select_by_value("down_bytes")
    assert drawn()[0].startswith("value. MB down until loss")
