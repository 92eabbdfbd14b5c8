"""What users install is what the tree holds: as wheel, from the sdist, editably."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.tree import PACKAGE, ROOT, modules, package_files

SITE = Path(sysconfig.get_path("purelib"))
APP = ROOT / "simulations" / "glue"
IMPORT_ALL = """
import importlib, json, sys
print(json.dumps({n: importlib.import_module(n).__file__ for n in sys.argv[1:]}))
"""


def call(*words, cwd, **environment):
    """Run a program that must succeed; return what it prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, words)],
        cwd=cwd,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def pip(*words, cwd, python=sys.executable):
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    return call(
        sys.executable, "-m", "pip", "--python", python, *quiet, *words, cwd=cwd
    )


def build_sdist(project, out):
    program = (sys.executable, "-m", "build", "--no-isolation", "--sdist")
    call(*program, "--outdir", out, project, cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    return sdist


def build_wheel(source, out):
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


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


def environment_with_dependencies(directory):
    """Make an environment that has what this one has, but for the package itself.

    Installing it all anew would take a quarter of an hour and several gigabytes. A .pth
    file puts the packages on the path, whose own .pth files, which put the checkout
    there, are not read from it; programs are started by the new Python.
    """
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(directory)})
    (Path(site) / "dependencies.pth").write_text(f"{SITE}\n")
    for entry in entry_points(group="console_scripts"):
        if entry.dist is not None and entry.dist.name != "lola-flwr":
            program = directory / "bin" / entry.name
            program.write_text(
                f"#!{python}\nimport sys\nfrom {entry.module} import {entry.attr}\n"
                f"sys.exit({entry.attr}())\n"
            )
            program.chmod(0o755)
    return python


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("source", ["checkout", "sdist"])
def test_an_installed_package_works_away_from_the_checkout(source, sdist, tmp_path):
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

    lola = tmp_path / "venv" / "bin" / "lola-flwr"
    assert "SuperLink" in call(lola, "doctor", cwd=elsewhere)
    assert "latency" in call(lola, "plan", "--devices", "12", cwd=elsewhere)

    shutil.copytree(APP, elsewhere / "app")
    tiny = ('model="random:roberta-tiny"', "rounds=2", "batch-size=4", "num-devices=4")
    simulate = (lola, "simulate", "app", "--devices", "4", "--plain", "--out", "run")
    printed = call(*simulate, *tiny, cwd=elsewhere, HOME=str(tmp_path / "home"))
    assert printed.splitlines()[-1].startswith("final: "), printed
    assert len((elsewhere / "run" / "rounds.jsonl").read_text().splitlines()) == 2

    # What `flwr build` packs, unpacked by Flower, and run by `flwr run`.
    flwr = tmp_path / "venv" / "bin" / "flwr"
    home = {"FLWR_HOME": str(tmp_path / "flower")}
    call(flwr, "build", "--app", elsewhere / "app", cwd=elsewhere, **home)
    (fab,) = elsewhere.glob("*.fab")
    call(flwr, "install", fab, cwd=elsewhere, **home)
    (unpacked,) = (tmp_path / "flower" / "apps").glob("*/pyproject.toml")
    run = (
        "import sys; from pathlib import Path\n"
        "from lola_flwr.simulation import run_app\n"
        "run = run_app(Path(sys.argv[1]), num_devices=4, run_config=sys.argv[2:],\n"
        "              home=Path('flower-home'))\n"
        "sys.exit(0 if run.completed else run.output)"
    )
    outputs = f'output-dir="{elsewhere / "of-fab"}"'
    call(python, "-c", run, unpacked.parent, *tiny, outputs, cwd=elsewhere)
    assert len((elsewhere / "of-fab" / "rounds.jsonl").read_text().splitlines()) == 2


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
