"""The documentation's site: whole, and of use from the disk as well as served."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urldefrag

import pytest

from tests.report.chromium import chromium
from tests.tree import ROOT, modules

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    path = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            *(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"),
            *("--config-file", ROOT / "docs" / "site" / "mkdocs.yml"),
            *("--site-dir", path),
        ],
        check=True,
        cwd=ROOT,
    )
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@contextmanager
def served(path):
    """Serve a directory on this machine; give its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=path)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_module_is_in_the_reference(site):
    for module in modules():
        _, _, path = module.partition(".")
        if path:
            page = site / "reference" / f"{path.partition('.')[0]}.html"
            assert f'id="{module}"' in page.read_text(), module


def test_links_lead_to_files(site):
    """What a browser is shown of a directory on the disk is a list of its files."""
    checked = 0
    for page in site.rglob("*.html"):
        # What stands there for a server that finds nothing has addresses of a server.
        if page.name == "404.html":
            continue
        for link in re.findall(r'(?:href|src)="?([^" >]+)', page.read_text()):
            target, _ = urldefrag(unquote(link))
            if target and not re.match(r"[a-z]+:", target):
                assert (page.parent / target).is_file(), (page, link)
                checked += 1
    assert checked > 500


def test_nothing_is_fetched(site):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img)[^>]*"(https?://[^"]*)', page.read_text()
        )
        assert fetched == [], page


@pytest.mark.parametrize("kind", ["disk", "server"])
def test_search_finds(browser, site, kind):
    from selenium.webdriver.support.wait import WebDriverWait

    with served(site) as address:
        start = site.as_uri() if kind == "disk" else address
        browser.get(f"{start}/index.html")
        field = browser.find_element("css selector", "input.md-search__input")
        browser.execute_script("arguments[0].focus()", field)
        field.send_keys("bandwidth")
        found = WebDriverWait(browser, 60).until(
            lambda page: page.find_elements("css selector", ".md-search-result__link")
        )
        links = [one.get_attribute("href") for one in found]
        assert any("allocation.html" in link for link in links)
        browser.get(links[0])
        assert "bandwidth" in browser.find_element("css selector", "article").text


@pytest.mark.parametrize("width", [390, 1280])
def test_tables_keep_names_whole(browser, site, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        checked = 0
        for page in sorted(site.glob("*.html")):
            browser.get(page.as_uri())
            for name, lines in browser.execute_script(LINES):
                assert lines == 1, (page.name, name)
                checked += 1
        assert checked > 100
        assert browser.execute_script(
            "return document.documentElement.scrollWidth <= innerWidth"
        )
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# Each word of a table's cells, and the number of lines that it is on.
LINES = """
const range = document.createRange();
return [...document.querySelectorAll("article table")].flatMap((table) => {
    const walk = document.createTreeWalker(table, NodeFilter.SHOW_TEXT);
    const words = [];
    while (walk.nextNode()) {
        const isCode = walk.currentNode.parentElement.closest("code");
        const pattern = isCode ? /\\S+/g : /[\\w.]+/g;
        for (const word of walk.currentNode.textContent.matchAll(pattern)) {
            range.setStart(walk.currentNode, word.index);
            range.setEnd(walk.currentNode, word.index + word[0].length);
            const tops = [...range.getClientRects()].map((box) => Math.round(box.top));
            words.push([word[0], new Set(tops).size]);
        }
    }
    return words;
});
"""
