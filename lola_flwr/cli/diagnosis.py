"""What works on this machine, and what to do about what does not."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from lola_flwr.cli.installed import (
    modules_of,
    own_modules,
    versions_of,
    why_not_imported,
)
from lola_flwr.errors import UserError, si
from lola_flwr.machine.hub import hub_host, why_no_hub
from lola_flwr.machine.installation import (
    PACKAGE,
    extras_of,
    install_command,
    requirements_of,
)
from lola_flwr.machine.memory import available_memory_bytes

# "ok"; "note": something is not there that not everyone needs; "problem".
Status = Literal["ok", "note", "problem"]

_RAY_S = 90.0
_GPU_S = 60.0
_CAP_NET_ADMIN = 12


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
        Whether all is imported, and a SuperLink and Ray started: half a minute.
    """
    yield machine()
    yield python()
    yield from packages(start=start)
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


def packages(package: str = PACKAGE, *, start: bool = True) -> Iterator[Finding]:
    """Check what the package and each of its extras require: versions, and imports.

    Parameters
    ----------
    package
        The distribution.
    start
        Whether all is imported, too, each part in a process of its own.
    """
    try:
        extras = extras_of(package)
    except PackageNotFoundError:
        yield Finding(package, "problem", "not installed", install_command())
        return
    yield _part("packages", package, "", "problem", start=start)
    if start:
        modules = own_modules()
        # Some of its modules are there for one extra alone, which may be missing.
        optional = [versions_of(requirements_of(package, extra)) for extra in extras]
        why = why_not_imported(modules, [n for v in optional for n in v.missing])
        says = f"its {len(modules)} modules can be imported" if why is None else why
        yield Finding(
            package,
            "ok" if why is None else "problem",
            says,
            "" if why is None else _newest(""),
        )
    for extra in extras:
        yield _part(f"extra {extra}", package, extra, "note", start=start)


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
            advice = f"{install_command('simulation')}, and see that it runs"
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
    advice = f"no simulation on this machine; {install_command('simulation')}"
    return Finding("Ray", "problem", reason[:200], advice)


def gpu() -> Finding:
    """Look for an accelerator that PyTorch can use."""
    # A driver that does not fit can take its process with it.
    program = (
        "from lola_flwr.deployment.host import accelerator\n"
        "print(f'accelerator: {accelerator() or str()}')"
    )
    code, output = _output([sys.executable, "-c", program], _GPU_S)
    last = output.strip().splitlines()[-1] if output.strip() else f"exit code {code}"
    if code:
        return Finding("GPU", "problem", f"PyTorch: {last}", install_command())
    if found := last.removeprefix("accelerator:").strip():
        return Finding("GPU", "ok", found)
    built = f"PyTorch {version('torch')} sees none; training uses the CPU"
    advice = ""
    if shutil.which("nvidia-smi"):
        advice = "nvidia-smi is here: install a CUDA build of PyTorch"
    return Finding("GPU", "note", built, advice)


def hub() -> Finding:
    """Try to reach the hub that models and data sets come from."""
    why = why_no_hub()
    if why is None:
        return Finding("hub", "ok", f"{hub_host()} answers")
    advice = "use model=minilm-l6 or a directory, and data-dir=DIR for GLUE"
    return Finding("hub", "note", why, advice)


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


def _part(
    subject: str, package: str, extra: str, otherwise: Status, *, start: bool
) -> Finding:
    """Check the requirements of an extra, or the package's own where that is ""."""
    wanted = requirements_of(package, extra)
    versions = versions_of(wanted)
    if versions.missing or versions.not_tested:
        return Finding(subject, otherwise, str(versions), install_command(extra))
    why = why_not_imported(modules_of(wanted)) if start else None
    if why is not None:
        says = f"cannot be imported, {why}; {versions}"
        return Finding(subject, otherwise, says, _newest(extra))
    return Finding(subject, "ok", str(versions))


def _newest(extra: str) -> str:
    """Return the command for what is there in the right versions and yet broken."""
    return f"{install_command(extra)} --upgrade --upgrade-strategy eager"


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
