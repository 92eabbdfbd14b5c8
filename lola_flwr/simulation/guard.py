"""Run a program that ends, with all that it started, when whoever wanted it is gone.

``python guard.py PROGRAM ARGUMENT ...`` runs the program and takes its exit code. The
guard's standard input is a pipe whose other end the starting process holds and never
writes to: it ends when that process does, also where a signal kills it that it cannot
catch. Flower's and Ray's programs start others in sessions of their own, which no
signal to a process group reaches; on Linux the guard adopts whatever of them loses its
parent, and so finds all of them under itself.

It is a program of the standard library alone, run by its path: a run starts some of
them, and none should take the time and the memory of an import.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

# How long what is told to end may take before it is killed, seconds.
GRACE_S = 3.0

# Where a process's exit code stands behind its name in /proc/PID/stat.
_EXIT_CODE = 49
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """Run the program until it ends, or until nobody wants it."""
    if hasattr(signal, "pthread_sigmask"):
        # From a terminal they reach the whole group; who started this decides.
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    wanted = True

    def end(*_: object) -> None:
        nonlocal wanted
        wanted = False

    signal.signal(signal.SIGTERM, end)
    prctl = _prctl()
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(
        sys.argv[1:],
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: _begin(prctl),
    )
    while wanted and process.poll() is None:
        # A signal interrupts the wait; a child's end is seen after it at the latest.
        with contextlib.suppress(InterruptedError):
            gone, _, _ = select.select([sys.stdin], [], [], 0.05)
            if gone and not os.read(sys.stdin.fileno(), 1):
                wanted = False
    _end_all(process)
    return process.returncode


def _begin(prctl: Callable[[int, int], object]) -> None:
    """Prepare the program, between fork and exec."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    # Should the guard itself be killed.
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """End the program and all that it started; kill what does not end by itself."""
    deadline = time.monotonic() + GRACE_S
    told: set[int] = set()
    while left := [*_descendants(os.getpid())]:
        number = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
        for pid in left:
            if number == signal.SIGKILL or pid not in told:
                told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        process.poll()
        _reap(process.pid)
        time.sleep(0.02)
    process.wait()


def _reap(own: int) -> None:
    """Take note of the end of what was adopted."""
    for pid in children().get(os.getpid(), ()):
        if pid != own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _descendants(pid: int) -> Iterator[int]:
    """Give the processes under a process that have not ended."""
    table = children()
    waiting = [pid]
    while waiting:
        for child in table.get(waiting.pop(), ()):
            waiting.append(child)
            if _state(child) not in ("Z", ""):
                yield child


def children() -> dict[int, list[int]]:
    """Return the children of every process (Linux; elsewhere of none)."""
    table: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for entry in os.listdir("/proc"):
            if entry.isdigit() and (stat := _stat(int(entry))):
                table.setdefault(int(stat[1]), []).append(int(entry))
    return table


def status_of(pid: int) -> int | None:
    """Return how a process that nobody has asked ended (a signal is negative).

    None while it lives, or where the system does not tell.
    """
    stat = _stat(pid)
    # The last field of /proc/PID/stat, as wait() gives it.
    if not stat or stat[0] != "Z":
        return None
    return os.waitstatus_to_exitcode(int(stat[_EXIT_CODE]))


def _state(pid: int) -> str:
    stat = _stat(pid)
    return stat[0] if stat else ""


def _stat(pid: int) -> list[str]:
    """Return a process's state, its parent and what follows; empty if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # A name in brackets stands before, which may hold anything.
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def _prctl() -> Callable[[int, int], object]:
    """Return Linux's prctl, or what does nothing elsewhere."""
    if not sys.platform.startswith("linux"):
        return lambda option, value: None
    library = ctypes.CDLL(None, use_errno=True)
    return lambda option, value: library.prctl(option, int(value), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
