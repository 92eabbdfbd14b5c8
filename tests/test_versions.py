"""What the page of versions, the citation and the changelog say is so.

``python -m tests.test_versions`` writes its tables.
"""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tree import ROOT

PAGE = ROOT / "docs" / "versions.md"
TABLE = re.compile(r"(?<=<!-- table -->\n\n).*?(?=\n<!-- end -->)", re.DOTALL)
# What users do not install.
DEVELOPMENT = {"dev", "docs"}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned():
    """Return the versions of the constraints file by package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, version in pins}


def table():
    """Return the page's table: what is needed, for what, in which versions."""
    needs = {"lola-flwr itself": project()["dependencies"]}
    for extra, listed in project()["optional-dependencies"].items():
        if extra not in DEVELOPMENT:
            needs[f"`[{extra}]`"] = listed
    pins = pinned()
    rows = [
        "| package | versions | tested with | for |",
        "|---|---|---|---|",
        f"| Python | {project()['requires-python']} | | everything |",
    ]
    for purpose, listed in needs.items():
        for one in map(Requirement, listed):
            tested = pins.get(canonicalize_name(one.name), "")
            extras = f"[{','.join(one.extras)}]" if one.extras else ""
            only = f" where {one.marker}" if one.marker else ""
            # As a person says it: from, then below.
            bounds = sorted(map(str, one.specifier), key=lambda bound: bound[0] == "<")
            rows.append(
                f"| `{one.name}{extras}` | {', '.join(bounds)} | {tested} | "
                f"{purpose}{only} |"
            )
    return "\n".join(rows) + "\n"


def test_the_page_says_what_is_declared():
    (shown,) = TABLE.findall(PAGE.read_text())
    assert shown == table(), "`python -m tests.test_versions` writes it"


def test_everything_that_users_install_is_there():
    shown = table()
    for need in ("`flwr` |", "`torch` |", "`peft` |", "`[simulation]`", "`[adapters]`"):
        assert need in shown
    assert "`[dev]`" not in shown


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for key in ("version", "license", "keywords"):
        assert citation[key] == project()[key]
    assert citation["title"] == project()["name"]
    paper = citation["preferred-citation"]
    # What the README says of it, and no more.
    readme = " ".join((ROOT / "README.md").read_text().split())
    names = ", ".join(author["family-names"] for author in paper["authors"])
    assert f"{names}, *{paper['title']}*" in readme
    assert paper["url"] in readme


def test_the_changelog_knows_this_version():
    changelog = (ROOT / "docs" / "changelog.md").read_text()
    assert re.search(
        rf"^## {re.escape(project()['version'])}\b", changelog, re.MULTILINE
    )


def test_commands_of_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert find_spec(module), module
    for path in re.findall(r"\]\(([^)]*)\)", text):
        assert (ROOT / path).exists(), path


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text()))
