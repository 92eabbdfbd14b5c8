"""Build the native programs, runner and device, for benchmarks and tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]


def why_not():
    """Return why the runner cannot be built here; None if it can be tried."""
    if find_spec("executorch") is None:
        return "needs the extra [export]"
    return _lacking(("cmake", "c++"), ("nlohmann/json.hpp", "openssl/evp.h"))


def why_no_device():
    """Return why the device cannot be built here; None if it can be tried."""
    headers = ("curl/curl.h", "google/protobuf/message_lite.h")
    return why_not() or _lacking(("protoc",), headers)


def _lacking(tools, headers):
    for tool in tools:
        if shutil.which(tool) is None:
            return f"needs {tool}"
    for header in headers:
        asked = ["c++", "-E", "-x", "c++", "-include", header, "/dev/null"]
        if subprocess.run(asked, capture_output=True).returncode:
            return f"needs <{header}>"
    return None


def built(directory):
    """Build the programs, install them under a directory, and return the runner.

    The device is beside it, as ``lola-device``, where it can be built.
    """
    package = Path(find_spec("executorch.exir").origin).parents[1]
    build, prefix = str(directory / "build"), str(directory / "installed")
    for command in (
        [
            *("cmake", "-S", str(ROOT / "clients" / "native"), "-B", build),
            f"-Dexecutorch_DIR={package / 'lib' / 'cmake' / 'executorch'}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DLOLA_DEVICE={'OFF' if why_no_device() else 'ON'}",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DCMAKE_CXX_FLAGS=-Werror",
        ],
        ["cmake", "--build", build],
        ["cmake", "--install", build, "--prefix", prefix, "--strip"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return Path(prefix) / "bin" / "lola-runner"


def installed_bytes(program):
    """Return what is installed with the runner, and what of the system it loads."""
    beside = program.parents[1]
    own = sum(p.stat().st_size for p in beside.rglob("*") if p.is_file())
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True)
    paths = [Path(w) for w in listed.stdout.split() if w.startswith("/")]
    system = {p.resolve() for p in paths if not p.resolve().is_relative_to(beside)}
    return own, sum(path.stat().st_size for path in system)
