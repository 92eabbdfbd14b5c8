"""Name a process so that a later one with the same number is not taken for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """A process of this host.

    Parameters
    ----------
    pid
        Its number.
    started
        When it started, in clock ticks since the start of the system.
    """

    pid: int
    started: int

    def is_alive(self) -> bool:
        """Tell whether the process still runs."""
        return _stat(self.pid)[1] == self.started

    @classmethod
    def from_header(cls, header: Sequence[int] | None) -> ProcessId | None:
        """Read what ``to_header`` gave."""
        return None if header is None else cls(*header)

    def to_header(self) -> list[int]:
        """Return the process as values that JSON knows."""
        return [self.pid, self.started]


def this_process() -> ProcessId:
    """Return this process."""
    return ProcessId(os.getpid(), _stat(os.getpid())[1])


# The resident node that this process is, if it is one.
_supernode: ProcessId | None = None


def be_supernode() -> None:
    """Say that this process is a SuperNode itself, which runs its clients in it."""
    global _supernode
    _supernode = this_process()


def supernode() -> ProcessId | None:
    """Return the SuperNode that this process belongs to; None if it has none."""
    return _supernode or ancestor_running("flower-supernode")


def ancestor_running(program: str) -> ProcessId | None:
    """Find the nearest ancestor of this process that runs a program; None if none does.

    Parameters
    ----------
    program
        Name of the program's file, such as ``"flower-supernode"``.
    """
    pid = os.getppid()
    while pid > 1:
        parent, started = _stat(pid)
        try:
            arguments = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        # A script's interpreter comes first.
        if any(Path(os.fsdecode(a)).name == program for a in arguments[:2]):
            return ProcessId(pid, started)
        pid = parent
    return None


def _stat(pid: int) -> tuple[int, int]:
    """Return the parent and the start of a process; zeros if there is no such one."""
    # Its first thread's: into a process's own `stat` qemu, which runs programs of other
    # processors, writes a start that others do not read.
    path = _PROC / str(pid) / "task" / str(pid) / "stat"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0, 0
    # The program's name stands in parentheses, and may hold anything.
    fields = text.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return 0, 0
    return int(fields[1]), int(fields[19])
