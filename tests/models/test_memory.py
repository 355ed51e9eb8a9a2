"""The tightest bound counts: system, control groups of either version with all that they lie in, process limits."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cadenza.models import ModelError, memory
from cadenza.models.memory import available_bytes, memory_of, require_memory

CPU = torch.device("cpu")
MOUNTS = {
    1: "35 31 0:32 {root} {mount} rw,relatime - cgroup cgroup rw,memory\n",
    2: "41 31 0:38 {root} {mount} rw,relatime - cgroup2 cgroup2 rw\n",
}
FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up /proc: 900 KB of memory, 500 of them available, no control groups."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:     500 kB\nHugePages_Total:  0\n")
    monkeypatch.setattr(memory, "PROC", folder)
    return folder


def mount_groups(proc: Path, version: int, root: str = "/", own: str = "/outer/inner") -> Path:
    mount = proc.parent / "cgroup"
    (mount / "outer/inner").mkdir(parents=True)
    names = "memory" if version == 1 else ""
    (proc / "self/cgroup").write_text(f"9:name=systemd:/\n0:{names}:{own}\n")
    (proc / "self/mountinfo").write_text(MOUNTS[version].format(root=root, mount=mount))
    return mount


def limit(group: Path, version: int, most: int | str, used: int, cached: int = 0) -> None:
    limit_file, used_file = FILES[version]
    (group / limit_file).write_text(f"{most}\n")
    (group / used_file).write_text(f"{used}\n")
    prefix = "total_" if version == 1 else ""
    (group / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file {cached}\n{prefix}active_file 1000\n")


def test_the_system(proc: Path) -> None:
    assert memory_of(CPU) == memory.Memory(500 * 1024, 900 * 1024, "the system's memory")


def test_a_system_that_says_nothing_refuses_nothing(proc: Path) -> None:
    (proc / "meminfo").unlink()
    assert available_bytes(CPU) is None
    require_memory(10**15, CPU, "it")


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_and_all_that_it_lies_in(proc: Path, version: int) -> None:
    mount = mount_groups(proc, version)
    limit(mount / "outer/inner", version, "max" if version == 2 else 2**63 - 4096, used=300_000)
    assert available_bytes(CPU) == 500 * 1024
    limit(mount / "outer/inner", version, 400_000, used=300_000, cached=49_000)
    found = memory_of(CPU)
    assert found is not None
    assert found.free == 400_000 - 300_000 + 50_000
    assert found.total == 400_000
    assert found.bound.endswith("outer/inner")
    limit(mount / "outer", version, 350_000, used=320_000)
    assert available_bytes(CPU) == 31_000


def test_a_group_may_be_the_root_of_what_is_mounted(proc: Path) -> None:
    """As in a container without a name space of its own: the host's path, mounted at the usual place."""
    mount = mount_groups(proc, 1, root="/host/container", own="/host/container/outer")
    limit(mount / "outer", 1, 400_000, used=100_000)
    limit(mount, 1, 200_000, used=100_000)
    assert available_bytes(CPU) == 101_000


def test_a_soft_limit_counts_too(proc: Path) -> None:
    mount = mount_groups(proc, 2)
    limit(mount / "outer/inner", 2, 400_000, used=100_000)
    (mount / "outer/inner/memory.high").write_text("150000\n")
    assert available_bytes(CPU) == 51_000


@pytest.mark.parametrize("name", ["DATA", "AS"])
def test_limits_of_the_process(name: str) -> None:
    """The kernel agrees: a little less than what is said to be free can be had, a little more cannot."""
    script = f"""
import mmap, resource
from cadenza.models.memory import _process_limits
resource.setrlimit(resource.RLIMIT_{name}, (10**9, 10**9))
(found,) = _process_limits()
assert found.total == 10**9 and "RLIMIT_{name}" in found.bound
kept = mmap.mmap(-1, found.free - 2**22, flags=mmap.MAP_PRIVATE)
try:
    mmap.mmap(-1, 2**23, flags=mmap.MAP_PRIVATE)
except OSError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "refused", done.stderr


def test_no_limit_is_no_bound() -> None:
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
    assert list(memory._process_limits()) == []


def test_a_refusal_has_the_numbers(proc: Path) -> None:
    require_memory(500_000, CPU, "it")
    expected = (
        r"m does not fit: its weights take 2\.00 GiB, cpu has 0\.00 GiB free of 0\.00 \(the system's memory\)"
    )
    with pytest.raises(ModelError, match=expected):
        require_memory(2 * 1024**3, CPU, "m")
