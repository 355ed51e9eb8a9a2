"""How much memory a device has left, and who says so: the system, a control group, a limit of the process, a GPU.

A model that cannot fit is refused before it is read. Knows nothing of models: bytes in, bytes out. Where the system
does not tell (it is not Linux), nothing is refused.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cadenza.models.errors import ModelError

if TYPE_CHECKING:
    import torch

GIB = 1024**3
PROC = Path("/proc")
_LIMITS = (("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize"))
"""Limits of the process, and the line of /proc/self/status that counts against each."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, as one of those who set bounds sees them."""

    free: int
    total: int
    bound: str
    """Who sets it."""


@dataclass(frozen=True, slots=True)
class _Files:
    """The names that a version of control groups has for its numbers."""

    limits: tuple[str, ...]
    used: str
    reclaimable: tuple[str, ...]
    """Lines of memory.stat: page cache, which the kernel gives up before it kills anyone."""


_VERSION_1 = _Files(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def require_memory(needed: int, device: "torch.device", what: str) -> None:
    memory = memory_of(device)
    if memory is not None and needed > memory.free:
        raise ModelError(
            f"{what} does not fit: its weights take {needed / GIB:.2f} GiB, "
            f"{device} has {memory.free / GIB:.2f} GiB free of {memory.total / GIB:.2f} ({memory.bound})"
        )


def available_bytes(device: "torch.device") -> int | None:
    """Free memory of the device; None where the system does not say."""
    memory = memory_of(device)
    return None if memory is None else memory.free


def memory_of(device: "torch.device") -> Memory | None:
    """The tightest of all bounds; None where there is none that could be read."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # by torch, to use again
        return Memory(int(free) + kept, int(total), torch.cuda.get_device_name(device))
    found = [*_system(), *_control_groups(), *_process_limits()]
    return min(found, key=lambda memory: memory.free, default=None)


def _system() -> Iterator[Memory]:
    lines = _fields(PROC / "meminfo")
    if "MemAvailable" in lines:
        free = lines["MemAvailable"]
        yield Memory(free, lines.get("MemTotal", free), "the system's memory")


def _control_groups() -> Iterator[Memory]:
    """Of the process's own group and of all that it lies in: each of them has a limit that holds for the sum."""
    for files, mount, root, path in _mounted_groups():
        inside = os.path.relpath(path, root) if path.startswith(root) else "."
        group = Path(os.path.normpath(mount / inside))
        while group.is_relative_to(mount):
            memory = _group(group, files)
            if memory is not None:
                yield memory
            group = group.parent


def _mounted_groups() -> Iterator[tuple[_Files, Path, str, str]]:
    """(file names, where groups are mounted, which group is mounted there, the group of this process) by version."""
    try:
        own = [line.split(":", 2) for line in (PROC / "self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (PROC / "self/mountinfo").read_text().splitlines()]
    except OSError:
        return
    paths = {name: path for _, names, path in own for name in names.split(",")}
    for fields in mounts:
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        mount, root = Path(fields[4]), fields[3]
        if kind == "cgroup2" and "" in paths:
            yield _VERSION_2, mount, root, paths[""]
        elif kind == "cgroup" and "memory" in options and "memory" in paths:
            yield _VERSION_1, mount, root, paths["memory"]


def _group(group: Path, files: _Files) -> Memory | None:
    limits = [int(text) for name in files.limits if (text := _text(group / name)).isdigit()]
    used = _text(group / files.used)
    if not limits or not used.isdigit():
        return None
    statistics = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    reclaimable = sum(int(statistics.get(name, 0)) for name in files.reclaimable)
    free = max(0, min(limits) - max(0, int(used) - reclaimable))
    return Memory(free, min(limits), f"the control group {group}")


def _process_limits() -> Iterator[Memory]:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    lines = _fields(PROC / "self/status")
    for name, counted in _LIMITS:
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY and counted in lines:
            yield Memory(max(0, limit - lines[counted]), limit, f"the process's {name}")


def _fields(file: Path) -> dict[str, int]:
    """Bytes by name, of lines such as `MemTotal: 12 kB`."""
    found = {}
    for line in _text(file).splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.removesuffix(" kB")) * 1024
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
