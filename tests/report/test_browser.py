"""The report in headless Chromium: it draws, complains about nothing, obeys keys."""

from __future__ import annotations

import csv

import pytest

from lola_flwr.planning import named_model_costs, plan_rounds
from lola_flwr.report import Report, Run
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


WIDE = """
const width = document.documentElement.clientWidth;
return [...document.querySelectorAll("main *")].filter((one) => {
    const box = one.getBoundingClientRect();
    return box.width > 0 && box.right > width + 1;
}).map((one) => one.outerHTML.slice(0, 80));
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_cut_off(page, width, theme):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        while (
            page.execute_script("return document.documentElement.dataset.theme")
            != theme
        ):
            find(page, "#theme").click()
        assert page.execute_script(WIDE) == []
        names = page.find_elements("css selector", "#timeline .name")
        shown = [name.text for name in names if name.get_attribute("role") == "cell"]
        assert len(set(shown)) == len(shown) > 1
        if width < 500:
            # A name has a line of its own, and as many as it needs.
            assert all(
                page.execute_script(
                    "return arguments[0].scrollWidth <= arguments[0].clientWidth", name
                )
                for name in names
            )
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


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
    assert "no allocation would have been faster" in find(page, "#coincide").text


def test_a_plan_is_called_a_plan(browser, tmp_path):
    records = plan_rounds(generate_fleet(8), named_model_costs("minilm-l6"), rounds=1)
    path = Report([Run("plan", records)]).save(tmp_path / "plan.html")
    browser.get(path.as_uri())
    text = find(browser, "body").text
    assert "A plan:" in text
    assert "observed" not in text.lower()
    assert not find(browser, "#learning").is_displayed()
    # One point alone is seen, too.
    assert colors(browser, "#latency-chart canvas") > 3


def test_charts_and_rounds_can_be_saved(page):
    page.execute_script(
        """window.saved = [];
        HTMLAnchorElement.prototype.click = function () {
            window.saved.push([this.download, this.href]);
        };
        URL.createObjectURL = (blob) => { window.blob = blob; return "blob:x"; };"""
    )
    find(page, "#latency .save").click()
    find(page, "#table").click()
    (chart, image), (table, _) = page.execute_script("return window.saved")
    assert chart.endswith(".png")
    assert image.startswith("data:image/png;base64,")
    assert table == "exact.csv"
    text = page.execute_async_script("window.blob.text().then(arguments[0])")
    rows = list(csv.DictReader(text.splitlines()))
    run = page.execute_script(
        "return JSON.parse(document.querySelector('#data').textContent)[0]"
    )
    assert len(rows) == len(run["device"])
    assert float(rows[-1]["upload_s"]) == run["upload_s"][-1]
    assert {row["device"] for row in rows} == set(run["devices"])
