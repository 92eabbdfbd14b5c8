"""What this process may have of the machine's memory, read from files as Linux's."""

from __future__ import annotations

import math
import sys

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.machine import memory as host_memory
from lola_flwr.machine.heap import give_back_freed_memory
from lola_flwr.machine.memory import available_memory_bytes

KIB, GB = 1024, 10**9
MEMINFO = {"MemTotal": 8 * GB, "MemFree": GB, "MemAvailable": 5 * GB}


class Machine:
    """A made-up Linux: /proc, and groups below the mounts that it tells."""

    def __init__(self, root, monkeypatch):
        self.root = root
        self.proc = root / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.usual = (root / "usual", root / "usual" / "memory")
        monkeypatch.setattr(host_memory, "_PROC", self.proc)
        monkeypatch.setattr(host_memory, "_USUAL_MOUNTS", self.usual)
        self.meminfo(**MEMINFO)

    def meminfo(self, **fields):
        lines = [f"{name}: {nbytes // KIB} kB\n" for name, nbytes in fields.items()]
        (self.proc / "meminfo").write_text("".join(lines) + "HugePages_Total: 0\n")

    def is_in(self, *lines):
        (self.proc / "self" / "cgroup").write_text("".join(f"{one}\n" for one in lines))

    def mounts(self, *mounts):
        """Tell of mounts, each (version, root, where); return where they are."""
        found, lines = [], ["22 1 0:21 / /proc rw - proc proc rw"]
        for version, root, where in mounts:
            path = self.root / where
            kind = "cgroup2 none rw" if version == 2 else "cgroup none rw,cpu,memory"
            shown = str(path).replace(" ", "\\040")
            lines.append(f"31 23 0:28 {root} {shown} rw,relatime shared:9 - {kind}")
            found.append(path)
        lines.append("32 23 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids")
        (self.proc / "self" / "mountinfo").write_text("\n".join(lines) + "\n")
        return found


def group_v2(path, *, limit="max", used=0, cache=0, high="max"):
    path.mkdir(parents=True, exist_ok=True)
    for name, value in {"max": limit, "high": high, "current": used}.items():
        (path / f"memory.{name}").write_text(f"{value}\n")
    stat = f"anon {used - cache}\nfile {cache}\ninactive_file {cache}\nactive_file 0\n"
    (path / "memory.stat").write_text(stat)


def group_v1(path, *, limit=2**63 - 4096, used=0, cache=0):
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (path / "memory.usage_in_bytes").write_text(f"{used}\n")
    stat = f"cache 0\ninactive_file 0\ntotal_inactive_file {cache}\n"
    (path / "memory.stat").write_text(stat)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def test_the_kernel_says_what_is_available(machine):
    assert available_memory_bytes() == pytest.approx(5 * GB, abs=KIB)


def test_a_kernel_that_does_not(machine):
    """Before Linux 3.14, or in a container: free, and cache but for shared memory."""
    machine.meminfo(MemTotal=8 * GB, MemFree=GB, Buffers=GB, Cached=3 * GB, Shmem=GB)
    assert available_memory_bytes() == pytest.approx(4 * GB, abs=4 * KIB)
    machine.meminfo(MemFree=GB)
    assert available_memory_bytes() == pytest.approx(GB, abs=KIB)


def test_a_system_that_tells_nothing(machine, monkeypatch):
    (machine.proc / "meminfo").unlink()
    assert available_memory_bytes() == pytest.approx(
        psutil.virtual_memory().available, rel=0.5
    )
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert available_memory_bytes() == math.inf
    assert host_memory.resident_memory_bytes() == 0


def test_cache_that_can_be_taken_back_is_not_used(machine):
    (mount,) = machine.mounts((2, "/", "cgroup"))
    machine.is_in("0::/")
    group_v2(mount, limit=4_294_967_296, used=4_200_000_000, cache=3_800_000_000)
    assert available_memory_bytes() == 3_894_967_296


def test_a_group_of_version_1(machine):
    (mount,) = machine.mounts((1, "/", "cgroup/memory"))
    machine.is_in("9:cpu:/", "5:name=systemd:/x", "4:cpuacct,memory:/")
    group_v1(mount, limit=1_073_741_824, used=200_000_000, cache=90_000_000)
    assert available_memory_bytes() == 963_741_824
    group_v1(mount, limit=1_073_741_824, used=2_000_000_000)
    assert available_memory_bytes() == 0


def test_the_process_is_in_a_group_of_its_own(machine):
    """As a service of systemd is; a group beside it does not count."""
    (mount,) = machine.mounts((2, "/", "cgroup"))
    machine.is_in("0::/system.slice/lola.service")
    group_v2(mount / "system.slice" / "lola.service", limit=GB, used=GB // 4)
    group_v2(mount / "system.slice" / "other.service", limit=1000)
    assert available_memory_bytes() == 3 * GB // 4
    # Above this one the kernel slows a group down until it is below.
    group_v2(mount / "system.slice" / "lola.service", limit=GB, high=GB // 2, used=7)
    assert available_memory_bytes() == GB // 2 - 7
    # The slice around it may be fuller.
    group_v2(mount / "system.slice", limit=2 * GB, used=2 * GB - 5)
    assert available_memory_bytes() == 5


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_shows_only_its_own_part_of_the_tree(machine, version):
    """Without a name space of its own it is told the host's path."""
    (mount,) = machine.mounts((version, "/docker/c0ffee", "a cgroup"))
    make = group_v1 if version == 1 else group_v2
    machine.is_in(
        ("7:memory:" if version == 1 else "0::") + "/docker/c0ffee/inner:group"
    )
    make(mount, limit=2 * GB, used=GB)
    assert available_memory_bytes() == GB
    make(mount / "inner:group", limit=GB, used=GB // 2)
    assert available_memory_bytes() == GB // 2
    # A process that was moved out of what its mount shows.
    machine.is_in("7:memory:/elsewhere", "0::/../elsewhere")
    assert available_memory_bytes() == GB


def test_both_versions_at_once(machine):
    one, two = machine.mounts((1, "/", "memory"), (2, "/", "unified"))
    machine.is_in("4:memory:/a", "0::/b")
    group_v1(one / "a", limit=3 * GB)
    group_v2(two / "b")
    assert available_memory_bytes() == 3 * GB
    group_v2(two / "b", limit=2 * GB)
    assert available_memory_bytes() == 2 * GB


@pytest.mark.parametrize("version", [1, 2])
def test_where_proc_does_not_tell_the_usual_places_are_read(machine, version):
    make = group_v1 if version == 1 else group_v2
    make(machine.usual[2 - version], limit=GB)
    assert available_memory_bytes() == GB
    machine.is_in()
    assert available_memory_bytes() == GB


@given(
    groups=st.lists(
        st.tuples(*[st.one_of(st.none(), st.integers(0, 6 * GB))] * 2, st.floats(0, 1)),
        min_size=1,
        max_size=5,
    ),
    version=st.sampled_from([1, 2]),
)
@pytest.mark.slow
def test_the_least_of_all_nested_limits_counts(tmp_path_factory, groups, version):
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(tmp_path_factory.mktemp("machine"), monkeypatch)
        (mount,) = machine.mounts((version, "/", "cgroup"))
        path = "/".join(f"g{depth}" for depth in range(1, len(groups)))
        machine.is_in(("3:memory:/" if version == 1 else "0::/") + path)
        left, group = [MEMINFO["MemAvailable"] // KIB * KIB], mount
        for depth, (limit, high, share) in enumerate(groups):
            group = group / f"g{depth}" if depth else group
            used = GB
            cache = int(share * used)
            if version == 1:
                values = {} if limit is None else {"limit": limit}
                group_v1(group, **values, used=used, cache=cache)
                high = None
            else:
                limits = {"limit": limit, "high": high}
                values = {k: v for k, v in limits.items() if v is not None}
                group_v2(group, **values, used=used, cache=cache)
            left += [
                max(bound - used + cache, 0)
                for bound in (limit, high)
                if bound is not None
            ]
        assert available_memory_bytes() == min(left)


def test_this_machine():
    assert 0 < available_memory_bytes() <= psutil.virtual_memory().total
    assert 0 < host_memory.held_memory_bytes() <= host_memory.resident_memory_bytes()


def test_peak_memory_is_that_since_the_reset():
    if not host_memory.reset_peak_memory():
        pytest.skip("this system does not reset its peak")
    # Or the block takes what other tests have freed.
    give_back_freed_memory()
    before = host_memory.resident_memory_bytes()
    block = np.ones(40_000_000, np.uint8)
    del block
    assert host_memory.peak_memory_bytes() - before > 30_000_000
    host_memory.reset_peak_memory()
    assert (
        host_memory.peak_memory_bytes() - host_memory.resident_memory_bytes()
        < 10_000_000
    )
