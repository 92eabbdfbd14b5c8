"""The memory of this machine, as far as this process may have it.

Linux tells by files under ``/proc`` and by its control groups, which containers and
services are; elsewhere psutil tells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_PROC = Path("/proc")
# Where the memory controller usually is, for systems that do not tell: versions 2, 1.
_USUAL_MOUNTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory"))
# Files of a group: its limit, what it uses, and of its statistics the page cache that
# is taken back before the limit is felt. Above memory.high a group is slowed down.
_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory_bytes() -> float:
    """Return the memory that this process can still get without swapping, in bytes.

    The least of what the system has and of what the process's control groups leave,
    from its own up to the root. Page cache that can be taken back counts as available.
    Infinite where nothing tells.
    """
    return min(_system_bytes(), *map(_left_in, _groups()), math.inf)


def resident_memory_bytes() -> int:
    """Return this process's resident memory, in bytes; 0 where nothing tells."""
    try:
        return _status()["VmRSS"]
    except (OSError, KeyError):
        pass
    try:
        import psutil
    except ImportError:
        return 0
    return int(psutil.Process().memory_info().rss)


def held_memory_bytes() -> int:
    """Return what this process alone holds, in bytes; 0 where nothing tells.

    The pages of files that it has mapped can be taken back, so they count as available.
    """
    with suppress(OSError, KeyError):
        status = _status()
        return status["RssAnon"] + status["RssShmem"]
    return resident_memory_bytes()


def reset_peak_memory() -> bool:
    """Let the peak of this process's memory begin anew; tell whether Linux did."""
    try:
        (_PROC / "self" / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int:
    """Return this process's largest resident memory since the last reset, in bytes."""
    return _status()["VmHWM"]


def _status() -> Mapping[str, int]:
    return _kib_fields(_PROC / "self" / "status")


def _kib_fields(path: Path) -> dict[str, int]:
    """Read the fields in kB of a file under /proc, as bytes."""
    text = path.read_text(encoding="ascii", errors="replace")
    lines = [line.split() for line in text.splitlines()]
    return {
        words[0].rstrip(":"): int(words[1]) * 1024
        for words in lines
        if words[-1:] == ["kB"]
    }


def _system_bytes() -> float:
    try:
        fields = _kib_fields(_PROC / "meminfo")
    except OSError:
        fields = {}
    if "MemAvailable" in fields:
        return float(fields["MemAvailable"])
    if "MemFree" in fields:
        # Before Linux 3.14, and in some containers. Shared memory is counted as cache,
        # and cannot be taken back.
        cached = fields.get("Cached", 0) - fields.get("Shmem", 0)
        return float(fields["MemFree"] + fields.get("Buffers", 0) + max(cached, 0))
    try:
        import psutil
    except ImportError:
        return math.inf
    return float(psutil.virtual_memory().available)


class _Hierarchy(NamedTuple):
    """A tree of control groups that counts memory.

    ``mount`` shows the tree from the group ``root`` on.
    """

    mount: Path
    root: PurePosixPath
    version: int


def _groups() -> Iterator[Path]:
    """Give the directories of this process's groups, and of those around them."""
    own = _own_groups()
    for tree in _hierarchies():
        path = own.get(tree.version, tree.root)
        # A process may be in a group that its mount does not show.
        inside = path.relative_to(tree.root) if path.is_relative_to(tree.root) else "."
        group = tree.mount / inside
        yield group
        yield from (up for up in group.parents if up.is_relative_to(tree.mount))


def _own_groups() -> dict[int, PurePosixPath]:
    """Return this process's group of each version."""
    found: dict[int, PurePosixPath] = {}
    for line in _lines(_PROC / "self" / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            found[1] = PurePosixPath(path)
        elif (number, controllers) == ("0", ""):
            found[2] = PurePosixPath(path)
    return found


def _hierarchies() -> Iterator[_Hierarchy]:
    for line in _lines(_PROC / "self" / "mountinfo"):
        before, _, after = line.partition(" - ")
        # proc(5): id, parent, device, root, mount point, ... - type, source, options
        kind, _, options = (*after.split(" "), "", "")[:3]
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            root, mount = map(_unescaped, before.split(" ")[3:5])
            version = 2 if kind == "cgroup2" else 1
            yield _Hierarchy(Path(mount), PurePosixPath(root), version)
    for version, usual in zip((2, 1), _USUAL_MOUNTS, strict=True):
        yield _Hierarchy(usual, PurePosixPath("/"), version)


def _unescaped(path: str) -> str:
    """Undo the octal escapes of blanks."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _left_in(group: Path) -> float:
    return min(_left_under(group, *files) for files in _LIMITS)


def _left_under(group: Path, limit: str, usage: str, cache: str) -> float:
    """Return what a limit leaves; infinite where there is none ("max"), or no file."""
    try:
        left_bytes = _number(group / limit) - _number(group / usage)
    except (OSError, ValueError):
        return math.inf
    with suppress(OSError, ValueError, KeyError):
        statistics = dict(line.split() for line in _lines(group / "memory.stat"))
        left_bytes += int(statistics[cache])
    return float(max(left_bytes, 0))


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
