"""A Debian for arm64 in a directory, made with Debian's own tools and run by qemu.

It is made once and kept in ``LOLA_ARM64_DIR`` (``/var/cache/lola-flwr-arm64``): delete
that directory to have it made anew. Its programs see the network of who starts them.
"""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

DIRECTORY = Path(os.environ.get("LOLA_ARM64_DIR", "/var/cache/lola-flwr-arm64"))
# What Debian 12 has.
PYTHON, GLIBC = "3.11", "2_36"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PACKAGES = "python3,python3-venv,systemd"
_UNREAD = ("doc", "man", "locale")
_PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "qemu-aarch64-static": "qemu-user-static",
    "update-binfmts": "binfmt-support",
}
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_HANDLER = _BINFMT / "qemu-aarch64"
_CERTIFICATES = "/etc/ssl/host-certificates.crt"
_LONGEST_S = 3600


def why_unavailable() -> str | None:
    """Return why there can be no arm64 Debian here, in one line; None if there can."""
    if os.geteuid() != 0:
        return "an arm64 Debian is made and entered by root"
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            return f"{program} is not installed (package {package})"
    if "binfmt_misc" not in Path("/proc/filesystems").read_text():
        return "this kernel has no binfmt_misc, which hands arm64 programs to qemu"
    return None


@dataclass(frozen=True)
class Debian:
    """A Debian that can be entered.

    Parameters
    ----------
    root
        Its root directory.
    """

    root: Path

    def command(
        self, words: Sequence[object], user: str | None = None, **environment: str
    ) -> list[str]:
        """Return the command that runs another one in it, with no other environment."""
        known = {
            "PATH": PATH,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        # Names would be looked up with this machine's libraries.
        who = () if user is None else (f"--userspec={self._ids(user)}", "--groups=")
        return [
            *("chroot", *who, str(self.root), "/usr/bin/env", "-i"),
            *(f"{key}={value}" for key, value in known.items()),
            *map(str, words),
        ]

    def run(self, *words: object, **environment: str) -> str:
        """Run a command in it that must succeed; return what it prints."""
        return call(self.command(words, **package_index(), **environment))

    def path(self, inside: str) -> Path:
        """Return where one of its files is on this machine."""
        return self.root / inside.lstrip("/")

    def _ids(self, user: str) -> str:
        for line in self.path("/etc/passwd").read_text().splitlines():
            name, _, uid, gid, *_ = line.split(":")
            if name == user:
                return f"{uid}:{gid}"
        raise KeyError(user)


def call(command: Sequence[str]) -> str:
    """Run a command that must succeed; return what it prints."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_LONGEST_S,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}"
    return done.stdout


def package_index() -> dict[str, str]:
    """Return the environment by which pip finds in the Debian what it finds here."""
    told = {
        key: value
        for key, value in os.environ.items()
        if key in ("PIP_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT")
        or key.lower() in ("http_proxy", "https_proxy", "no_proxy")
    }
    return {
        **told,
        "PIP_CERT": _CERTIFICATES,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        # Python compiles what it imports; all of it would take qemu many minutes.
        "PIP_NO_COMPILE": "1",
        "PIP_PROGRESS_BAR": "off",
    }


def lay_out(board: Debian, prefix: str, *requirements: object) -> None:
    """Unpack packages into an environment of the Debian that is yet to be made.

    uv does it on this machine's own processor in seconds; in the emulator pip takes the
    better part of an hour. The kits' pip then finds them there.

    Parameters
    ----------
    board
        The Debian.
    prefix
        Where the environment will be; what is there is removed.
    requirements
        As for ``uv pip install``. Those without a wheel for arm64 are refused.
    """
    shutil.rmtree(board.path(prefix), ignore_errors=True)
    site = board.path(prefix) / "lib" / f"python{PYTHON}" / "site-packages"
    site.mkdir(parents=True)
    with TemporaryDirectory() as directory:
        constraints = Path(directory) / "constraints.txt"
        constraints.write_text(cpu_constraints())
        call(
            [
                *(sys.executable, "-m", "uv", "pip", "install", "--quiet"),
                *("--target", str(site), "--python-version", PYTHON),
                *("--python-platform", f"aarch64-manylinux_{GLIBC}"),
                *("--only-binary", ":all:", "--constraints", str(constraints)),
                *map(str, requirements),
            ]
        )


def cpu_constraints() -> str:
    """Return this project's tested versions, but a PyTorch that brings no CUDA.

    From 2.11 on PyPI's wheels for arm64 ask for CUDA's libraries; PyTorch's own index
    of builds for the CPU may be out of reach.
    """
    text = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    return re.sub("^torch==.*", "torch<2.11", text, flags=re.MULTILINE)


@contextmanager
def debian() -> Iterator[Debian]:
    """Give the Debian; what is mounted and registered for it is taken back."""
    found = Debian(DIRECTORY / "root")
    with ExitStack() as stack:
        stack.enter_context(_handler())
        if not (DIRECTORY / "complete").exists():
            _make(found.root)
            (DIRECTORY / "complete").touch()
        for name in ("/etc/resolv.conf", "/etc/hosts"):
            shutil.copyfile(name, found.path(name))
        bundle = os.environ.get("PIP_CERT") or ssl.get_default_verify_paths().cafile
        if bundle:
            shutil.copyfile(bundle, found.path(_CERTIFICATES))
        stack.enter_context(_mounted("proc", "proc", found.path("/proc")))
        yield found


def _make(root: Path) -> None:
    # Half a Debian is none. What is mounted in one that was left is not of it.
    if (root / "proc").is_mount():
        call(["umount", str(root / "proc")])
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    # This machine's apt and dpkg unpack, and arm64 programs only configure: with
    # debootstrap, which does all of it in the emulator, it takes several times as long.
    call(
        [
            *("mmdebstrap", "--architectures=arm64", "--variant=minbase"),
            f"--include={_PACKAGES}",
            # dpkg waits for the disk after each file; this can be made anew.
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _UNREAD),
            *("bookworm", str(root)),
        ]
    )


@contextmanager
def _handler() -> Iterator[None]:
    """Have the kernel hand arm64 programs to qemu."""
    with ExitStack() as stack:
        if not (_BINFMT / "register").exists():
            stack.enter_context(_mounted("binfmt_misc", "binfmt_misc", _BINFMT))
        if not _HANDLER.exists():
            call(["update-binfmts", "--enable", "qemu-aarch64"])
            stack.callback(call, ["update-binfmts", "--disable", "qemu-aarch64"])
        yield


@contextmanager
def _mounted(kind: str, what: str, where: Path) -> Iterator[None]:
    # One that was killed leaves it mounted.
    if where.is_mount():
        call(["umount", str(where)])
    call(["mount", "-t", kind, what, str(where)])
    try:
        yield
    finally:
        with suppress(AssertionError):
            call(["umount", str(where)])
