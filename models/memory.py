"""How much memory a device has left for weights: a model that cannot fit is refused before it is read.

Knows nothing of models: bytes in, bytes out.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from cadenza.models.errors import ModelError

if TYPE_CHECKING:
    import torch

MEMINFO = Path("/proc/meminfo")
# (limit, in use, in use but reclaimable at once) of cgroup version 2 and version 1, as containers see them.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"), "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        "total_inactive_file",
    ),
)


def require_memory(needed: int, device: "torch.device", what: str) -> None:
    free = available_bytes(device)
    if free is not None and needed > free:
        raise ModelError(
            f"{what} does not fit: its weights take {needed / 1e9:.2f} GB, "
            f"{device} has {free / 1e9:.2f} GB free"
        )


def available_bytes(device: "torch.device") -> int | None:
    """Free memory of the device; None where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    bounds = [bound for bound in (_system_available(), _container_available()) if bound is not None]
    return min(bounds, default=None)


def _system_available() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container_available() -> int | None:
    for limit, used, reclaimable in CGROUPS:
        try:
            bound = limit.read_text().strip()
            if bound == "max":
                return None
            statistics = dict(
                line.split() for line in (limit.parent / "memory.stat").read_text().splitlines()
            )
            return int(bound) - int(used.read_text()) + int(statistics.get(reclaimable, 0))
        except (OSError, ValueError):
            continue
    return None
