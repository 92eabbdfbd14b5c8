"""What works on this machine, and what to do about what does not."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from lola_flwr.deployment.host import accelerator
from lola_flwr.errors import UserError, si
from lola_flwr.machine.memory import available_memory_bytes

# "ok"; "note": something is not there that not everyone needs; "problem".
Status = Literal["ok", "note", "problem"]

_RAY_S = 90.0
_HUB_S = 3.0
_CAP_NET_ADMIN = 12
# Extras that a part of the package needs, with what one goes without.
_EXTRAS = {
    "simulation": "no simulation on this machine",
    "glue": "the app under simulations/glue does not run",
    "offline": "the model minilm-l6 has to come from elsewhere",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Parameters
    ----------
    subject
        What was looked at.
    status
        How it is.
    says
        What was found.
    advice
        What to do; empty if there is nothing to do.
    """

    subject: str
    status: Status
    says: str
    advice: str = ""


def diagnose(*, start: bool = True) -> Iterator[Finding]:
    """Look at everything, one finding after the other.

    Parameters
    ----------
    start
        Whether a SuperLink and Ray are started, which takes some seconds.
    """
    yield machine()
    yield python()
    yield from packages()
    if start:
        yield superlink()
        yield ray()
    yield gpu()
    yield hub()
    yield traffic_control()
    yield openssl()


def machine() -> Finding:
    """Tell the processors and the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = min(available_memory_bytes(), memory)
    says = (
        f"{platform.system()}, {os.cpu_count()} CPUs, {si(memory, 'B')} of memory, "
        f"{si(available, 'B')} of it to be had"
    )
    if available < 4e9:
        return Finding(
            "machine", "note", says, "simulate few devices and a small model"
        )
    return Finding("machine", "ok", says)


def python() -> Finding:
    """Tell Python's version, and which Python this is."""
    return Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def packages(package: str = "lola-flwr") -> Iterator[Finding]:
    """Check the versions of what is needed, and of what its extras need."""
    try:
        wanted = [Requirement(line) for line in requires(package) or []]
    except PackageNotFoundError:
        yield Finding(package, "problem", "not installed", "pip install -e .")
        return
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    yield _versions("packages", needed, "problem", f"pip install {package}")
    for extra, without in _EXTRAS.items():
        additional = [
            r
            for r in wanted
            if r not in needed and r.marker and r.marker.evaluate({"extra": extra})
        ]
        advice = f"{without}; pip install '{package}[{extra}]'"
        yield _versions(f"extra {extra}", additional, "note", advice)


def superlink() -> Finding:
    """Start a SuperLink, and stop it."""
    # It imports nothing heavy, but lola_flwr shall be diagnosed without Flower, too.
    from lola_flwr.simulation import own_superlink

    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        try:
            with own_superlink(Path(home)):
                seconds = time.monotonic() - begun
        except UserError as error:
            advice = "pip install 'flwr[simulation]', and see that it runs"
            return Finding("SuperLink", "problem", str(error), advice)
    return Finding("SuperLink", "ok", f"starts in {seconds:.1f} s")


def ray() -> Finding:
    """Start Ray, let it compute something, and stop it."""
    program = (
        "import ray; ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)"
        "; print(ray.get(ray.remote(lambda: 'works').remote()), ray.__version__)"
    )
    from lola_flwr.simulation.ray_directory import ray_environment

    begun = time.monotonic()
    try:
        with ray_environment() as for_ray:
            code, output = _output(
                [sys.executable, "-c", program], _RAY_S, {**os.environ, **for_ray}
            )
    except UserError as error:
        return Finding("Ray", "problem", str(error), "no simulation before that")
    if code == 0 and "works" in output:
        version_said = output.split()[-1]
        seconds = time.monotonic() - begun
        return Finding("Ray", "ok", f"{version_said} starts in {seconds:.1f} s")
    reason = output.strip().splitlines()[-1] if output.strip() else "no output"
    advice = "no simulation on this machine; pip install 'lola-flwr[simulation]'"
    return Finding("Ray", "problem", reason[:200], advice)


def gpu() -> Finding:
    """Look for an accelerator that PyTorch can use."""
    try:
        found = accelerator()
    except ImportError as error:
        return Finding("GPU", "problem", f"PyTorch: {error}", "pip install torch")
    if found is not None:
        return Finding("GPU", "ok", found)
    built = f"PyTorch {version('torch')} sees none; training uses the CPU"
    advice = ""
    if shutil.which("nvidia-smi"):
        advice = "nvidia-smi is here: install a CUDA build of PyTorch"
    return Finding("GPU", "note", built, advice)


def hub() -> Finding:
    """Try to reach the hub that models and data sets come from."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    parts = urlsplit(endpoint)
    address = (parts.hostname or "", parts.port or 443)
    try:
        with socket.create_connection(address, timeout=_HUB_S):
            return Finding("hub", "ok", f"{parts.hostname} answers")
    except OSError as error:
        return Finding(
            "hub",
            "note",
            f"{parts.hostname} cannot be reached ({error.__class__.__name__})",
            "use model=minilm-l6 or a directory, and data-dir=DIR for GLUE",
        )


def traffic_control() -> Finding:
    """Check whether an uplink can be shaped here: tc, and the right to use it."""
    if shutil.which("tc", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin") is None:
        advice = "shares of the uplink are kept in user space; apt install iproute2"
        return Finding("tc", "note", "not installed", advice)
    if not _may_administer_network():
        advice = "shares of the uplink are kept in user space; give CAP_NET_ADMIN"
        return Finding("tc", "note", "installed, but without CAP_NET_ADMIN", advice)
    return Finding("tc", "ok", "installed, and this user may shape links")


def openssl() -> Finding:
    """Look for openssl, which makes a deployment's certificates and keys."""
    found = shutil.which("openssl")
    if found is None:
        return Finding("openssl", "note", "not installed", "deployment needs it")
    return Finding("openssl", "ok", _output([found, "version"], 10.0)[1].strip())


def _versions(
    subject: str, wanted: Sequence[Requirement], otherwise: Status, advice: str
) -> Finding:
    there, faults = [], []
    for requirement in wanted:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            faults.append(f"{requirement.name} is missing")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            there.append(f"{requirement.name} {found}")
        else:
            faults.append(f"{requirement.name} {found} is not {requirement.specifier}")
    if faults:
        return Finding(subject, otherwise, ", ".join(faults), advice)
    return Finding(subject, "ok", ", ".join(there))


def _output(
    command: Sequence[str], timeout_s: float, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {timeout_s:g} s"
    return done.returncode, done.stdout


def _may_administer_network() -> bool:
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return False
    (line,) = [line for line in status.splitlines() if line.startswith("CapEff:")]
    return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
