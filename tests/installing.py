"""Build the package and install it into environments of their own, away from here."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import entry_points
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))


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
