"""The device kits: scripts and units are checked as far as they can be without one."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import (
    PackageNotFoundError,
    packages_distributions,
    requires,
)
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

KITS = Path(__file__).parents[2] / "clients"
MAKE_KEYS = KITS / "linux" / "make-keys.sh"
SCRIPTS = sorted(KITS.glob("*/*.sh"))
UNITS = sorted(KITS.glob("*/*.service"))


def make_keys(*arguments):
    for program in ("openssl", "ssh-keygen"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    return subprocess.run(
        [MAKE_KEYS, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys") / "private"
    made = make_keys(directory, "server", "superlink.lan", "10.0.0.7", "fe80::7")
    assert made.returncode == 0, made.stderr
    made = make_keys(directory, "node", "board-1", "phone.2")
    assert made.returncode == 0, made.stderr
    return directory


def test_kits_ask_for_the_versions_that_the_package_does():
    project = tomllib.loads((KITS.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    wanted = {(r := Requirement(line)).name: r.specifier for line in lines}
    asked = {
        requirement.name: requirement.specifier
        for script in SCRIPTS
        for text in re.findall(
            r"""["']([a-z-]+[<>=]=[^"'$]*)["']""", script.read_text()
        )
        for requirement in (Requirement(text),)
    }
    assert len(asked) > 10
    assert {name: wanted[name] for name in asked.keys() & wanted.keys()} == {
        name: asked[name] for name in asked.keys() & wanted.keys()
    }


APPS = ("glue", "adapters", "offline")
# What is started in each Python of a device that has two.
WORKER = (
    "lola_glue.device",
    "lola_flwr.cli.profile",
    "lola_flwr.deployment.serve_worker",
)
NODE = "lola_glue.client_app", "lola_flwr.cli.main", "lola_flwr.deployment.node.command"


@pytest.mark.parametrize(
    ("modules", "script", "has", "anywhere"),
    [
        pytest.param(
            *(WORKER, "jetson", ["torch"], True), id="worker", marks=pytest.mark.slow
        ),
        pytest.param(NODE, "linux", [], False, id="node"),
    ],
)
def test_each_python_has_all_that_it_imports(modules, script, has, anywhere):
    """A kit names what it installs there; the package's own dependencies stay out.

    What the worker imports where it is needed counts too: it trains.
    """
    project = tomllib.loads((KITS.parent / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in APPS:
        lines += project["optional-dependencies"][extra]
    needed = {canonicalize_name(Requirement(line).name) for line in lines}
    installed = closure([*has, *first_installed(KITS / script / "install.sh")])
    owners = packages_distributions()
    imported = {
        canonicalize_name(owner)
        for file in our_files(modules)
        for module in imports(ast.parse(file.read_text()), anywhere)
        for owner in owners.get(module, ())
    }
    lacking = imported & needed - installed
    # The worker imports nothing of Flower, which is tested, and gets its data sets
    # without what they require.
    assert lacking - {"flwr", "flwr-datasets"} == set()


def first_installed(script):
    """Return what the first installation of a kit that names packages names."""
    text = script.read_text().replace("\\\n", " ")
    line = re.search(r' install --quiet (.*"numpy.*)', text)[1]
    return [Requirement(word.strip('"')).name for word in line.split()]


def our_files(modules):
    """Return the files of this project that are loaded with some modules."""
    code = (
        f"import sys, {', '.join(modules)}\n"
        "ours = [m for n, m in sys.modules.items() if n.startswith('lola_')]\n"
        "print(*(m.__file__ for m in ours))"
    )
    app = KITS.parent / "simulations" / "glue"
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=app, text=True)
    return [Path(name) for name in printed.split()]


def imports(tree, anywhere):
    """Return the packages that a module imports: as it is loaded, or anywhere."""
    for statement in ast.walk(tree) if anywhere else tree.body:
        if isinstance(statement, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            yield statement.module.partition(".")[0]


def closure(names):
    """Return some distributions and all that they require here."""
    found, todo = set(), list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in found:
            found.add(name)
            with contextlib.suppress(PackageNotFoundError):
                wanted = map(Requirement, requires(name) or ())
                todo += [r.name for r in wanted if not r.marker or r.marker.evaluate()]
    return found


def test_there_are_kits():
    assert {path.parent.name for path in SCRIPTS} == {"android", "jetson", "linux"}
    assert len(UNITS) == 2


@pytest.mark.parametrize(
    "script", SCRIPTS, ids=lambda path: path.parent.name + path.name
)
def test_scripts_are_plain_shell(script):
    beside = Path(sys.executable).with_name("shellcheck")
    checker = beside if beside.exists() else shutil.which("shellcheck")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([checker, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert script.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_what_systemd_expects(unit, tmp_path):
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    # What they start is on a device only.
    text = unit.read_text().replace("/opt/lola-flwr/libexec/", f"{KITS}/linux/")
    copy = tmp_path / unit.name
    copy.write_text(text)
    for other in UNITS:
        (tmp_path / other.name).touch()
    done = subprocess.run([program, "verify", copy], capture_output=True, text=True)
    if "Failed to initialize manager" in done.stderr:
        pytest.skip("systemd-analyze does not work here")
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert complaints == []


def test_private_files_are_the_owners_alone(keys):
    private = ["ca.key", "server.key", "nodes/board-1", "nodes/phone.2"]
    for name in private:
        assert stat.S_IMODE((keys / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE((keys / "ca.crt").stat().st_mode) == 0o644


def test_the_certificate_names_the_superlink_and_the_relay(keys):
    command = ["openssl", "x509", "-in", keys / "server.crt", "-noout", "-ext"]
    shown = subprocess.run(
        [*command, "subjectAltName"], capture_output=True, text=True, check=True
    ).stdout
    for name in ("DNS:superlink.lan", "IP Address:10.0.0.7", "IP Address:127.0.0.1"):
        assert name in shown
    assert "IP Address:FE80" in shown
    verify = ["openssl", "verify", "-CAfile", keys / "ca.crt", keys / "server.crt"]
    assert subprocess.run(verify, capture_output=True).returncode == 0


def test_flower_can_read_a_nodes_key(keys):
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    key = load_ssh_private_key((keys / "nodes" / "board-1").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)


def test_nothing_is_overwritten(keys):
    before = {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()}
    for arguments in (("server", "other.lan"), ("node", "board-1")):
        done = make_keys(keys, *arguments)
        assert done.returncode == 1
        assert "nothing is overwritten" in done.stderr
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("name", ["../x", "-x", ".x", "a b", "a/b"])
def test_a_nodes_name_is_a_file_name(tmp_path, name):
    done = make_keys(tmp_path, "node", name)
    assert done.returncode == 1
    assert "use letters" in done.stderr


def test_usage_is_shown(tmp_path):
    assert "make-keys.sh DIR server HOST" in make_keys("--help").stdout
    assert make_keys(tmp_path, "server").returncode == 2
    assert make_keys(tmp_path, "other", "x").returncode == 2


def test_debian_on_a_phone_is_told_what_the_user_says(tmp_path):
    """Nothing of Termux's environment reaches the Debian in it by itself."""
    fake = tmp_path / "proot-distro"
    fake.write_text(f'#!/bin/sh\necho "$*" >{tmp_path}/asked\ncat >{tmp_path}/script\n')
    fake.chmod(0o700)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOLA_UPLINK_MBPS": "2.5",
        "LOLA_MODEL": "my model",
    }
    subprocess.run(["sh", KITS / "android" / "run.sh"], check=True, env=environment)
    assert (tmp_path / "asked").read_text() == "login debian -- sh -eu\n"
    script = (tmp_path / "script").read_text()
    stated, _, rest = script.partition(". /etc/lola-flwr/device.env\n")
    program = f'{stated}printf "%s|%s" "$uplink_mbps" "$model"'
    told = subprocess.check_output(["sh", "-eu", "-c", program], text=True, env={})
    assert told == "2.5|my model"
    assert subprocess.run(["sh", "-n"], input=rest, text=True).returncode == 0
