"""What users install is what the tree holds: as wheel, from the sdist, editably."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tests.installing import (
    SITE,
    build_sdist,
    build_wheel,
    call,
    environment_with_dependencies,
    pip,
)
from tests.tree import PACKAGE, ROOT, modules, package_files

IMPORT_ALL = """
import importlib, json, sys
print(json.dumps({n: importlib.import_module(n).__file__ for n in sys.argv[1:]}))
"""


def installed_files(archive):
    """Return what a wheel puts beside other packages, its own description left out."""
    with zipfile.ZipFile(archive) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def expected_files():
    """Return the tree's; directories without Python are kits, for a checkout."""
    files = package_files()
    kits = {path.parent for path in files.values()} - {
        path.parent for path in files.values() if path.suffix == ".py"
    }
    kits -= {path for path in kits if path.is_relative_to(PACKAGE / "report")}
    return {name for name, path in files.items() if path.parent not in kits}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build_sdist(ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Made from the sdist, as pip does where there is no wheel."""
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


def test_the_tree_is_what_it_seems():
    assert {"lola_flwr", "lola_flwr.clients.node", "lola_flwr.strategies.d2ft"} <= {
        *modules()
    }
    assert len(modules()) > 150
    assert "lola_flwr/report/vendor/LICENSE.uplot" in expected_files()
    assert "lola_flwr/clients/linux/install.sh" not in expected_files()


def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    assert installed_files(wheel) == expected_files()


# In the fast suite the wheel holds the tree, whose modules tests import.
@pytest.mark.slow
def test_every_module_of_the_tree_can_be_imported_from_the_wheel(wheel, tmp_path):
    target = tmp_path / "installed"
    pip("install", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    # Without the site module there are no .pth files, and so no checkout on the path.
    start = f"import sys; sys.path += [{str(target)!r}, {str(SITE)!r}]\n"
    program = (sys.executable, "-I", "-S", "-c", start + IMPORT_ALL)
    printed = call(*program, *modules(), cwd=tmp_path)
    for module, file in json.loads(printed.splitlines()[-1]).items():
        assert Path(file).is_relative_to(target), module


def copy_of_project(directory):
    for name in ("lola_flwr", "clients", "strategies"):
        shutil.copytree(ROOT / name, directory / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, directory)
    return directory


def test_a_wheel_is_of_the_tree_as_it_is_now(tmp_path):
    """New rooms are in it, whatever their name; what was removed is not.

    Not even out of a directory that another build backend left behind.
    """
    project = copy_of_project(tmp_path / "project")
    # Output directories of these names are ignored, at the root alone.
    new = {"strategies/new.py", *(f"lola_flwr/{n}/new.py" for n in ("build", "runs"))}
    for name in new:
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).touch()
    before = build_wheel(project, tmp_path)
    assert installed_files(before) - expected_files() == {
        name.replace("strategies", "lola_flwr/strategies") for name in new
    }
    before.unlink()
    for name in new:
        (project / name).unlink()
    left = project / "build" / "lib" / "lola_flwr" / "strategies" / "new.py"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    assert installed_files(build_wheel(project, tmp_path)) == expected_files()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", ["checkout", "sdist"])
def test_an_installed_package_is_the_environments_own(source, sdist, tmp_path):
    python = environment_with_dependencies(tmp_path / "venv")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    extras = "[simulation,glue,adapters,offline]"
    package = f"{ROOT if source == 'checkout' else sdist}{extras}"
    # Nothing is fetched: whatever the extras ask for must be there.
    options = ("--no-index", "--no-build-isolation")
    pip("install", *options, package, cwd=elsewhere, python=python)

    printed = call(python, "-I", "-c", IMPORT_ALL, *modules(), cwd=elsewhere)
    for module, file in json.loads(printed.splitlines()[-1]).items():
        assert Path(file).is_relative_to(tmp_path / "venv"), module


@pytest.mark.slow
def test_an_editable_install_follows_the_tree(tmp_path):
    """Modules made later can be imported, in the linked directories, too."""
    project = copy_of_project(tmp_path / "project")
    python = environment_with_dependencies(tmp_path / "venv")
    options = ("--no-deps", "--no-build-isolation", "--editable")
    pip("install", *options, project, cwd=tmp_path, python=python)
    for name in ("clients", "lola_flwr/server"):
        (project / name / "made_later.py").touch()
    made = ("lola_flwr.clients.made_later", "lola_flwr.server.made_later")
    printed = call(python, "-I", "-c", IMPORT_ALL, *modules(), *made, cwd=tmp_path)
    for module, file in json.loads(printed.splitlines()[-1]).items():
        assert Path(file).is_relative_to(project), module
