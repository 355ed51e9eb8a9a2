"""What the user allows a model to take: sizes as people write them, on the device, in CPU memory and on disk.

Free of torch, and knows nothing of models.
"""

import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from cadenza.models.errors import ModelError

GIB = 1024**3
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?", re.IGNORECASE)


@dataclass(frozen=True)
class StepNeeds:
    """What an engine takes beside the weights; the defaults are those of an engine on a CPU."""

    kv_cache_bytes: int | None = None
    """None: the engine takes what is left for it."""
    num_tokens: int = 512
    """Tokens per step."""
    num_rows: int = 64
    """Rows of a step whose logits are read."""
    num_seqs: int = 64
    """Sequences that run at once."""
    context_length: int = 2**20
    """A sequence's tokens at most."""
    least_kv_tokens: int = 128
    """With a KV cache of fewer tokens the engine does not start."""


@dataclass(frozen=True)
class Limits:
    """Bytes; None: as much as is free."""

    device_bytes: int | None
    """Of everything on the device that computes: weights, KV cache, a step's working memory."""
    cpu_bytes: int | None
    """Of weights that wait in CPU memory for another device."""
    cpu_offload_bytes: int
    """So many bytes of weights wait in CPU memory even if the device has room for them."""
    folder: Path | None
    """Where to put tensors that cannot be read from the checkpoint as they lie there."""
    needs: StepNeeds = StepNeeds()


def limits(
    max_memory: str | None, cpu_offload_gb: float, offload_folder: str | None, device: str, needs: StepNeeds
) -> Limits | None:
    """None: nothing is limited, and nothing offloaded. device: cpu, or cuda:N. Raises `ModelError`."""
    device = "cuda:0" if device == "cuda" else device
    if not (isfinite(cpu_offload_gb) and cpu_offload_gb >= 0):
        raise ModelError(f"cpu_offload_gb must not be negative or infinite, got {cpu_offload_gb:g}")
    if cpu_offload_gb and device == "cpu":
        raise ModelError(
            "cpu_offload_gb: the model computes on the CPU, whose memory it would be offloaded to;"
            " max_memory bounds what it takes there"
        )
    if max_memory is None and not cpu_offload_gb:
        if offload_folder is not None:
            raise ModelError(
                "offload_folder: nothing is offloaded unless max_memory or cpu_offload_gb is given"
            )
        return None
    sizes = {} if max_memory is None else parse_max_memory(max_memory, device)
    folder = None if offload_folder is None else Path(offload_folder).expanduser().absolute()
    cpu_bytes = None if device == "cpu" else sizes.get("cpu")
    return Limits(sizes.get(device), cpu_bytes, int(cpu_offload_gb * GIB), folder, needs)


def size_text(size: int) -> str:
    """In the unit that people would use."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:.{2 if size < 10 * factor else 1}f} {unit}"
    return f"{size / 1024:.0f} KiB" if size >= 1024 else f"{size} bytes"


def parse_max_memory(text: str, device: str) -> dict[str, int]:
    """Bytes by device: of `20GiB` for the one that computes, of `cuda:0=20GiB,cpu=30GiB` for each."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.rpartition("=")
        name = name.strip() if equals else device
        name = "cuda:0" if name in ("cuda", "0") else name
        if name in sizes:
            raise ModelError(f"max_memory {text!r} names {name} twice")
        if name not in (device, "cpu"):
            raise ModelError(
                f"max_memory {text!r} names {name}, where nothing is kept: the model computes on {device}"
            )
        sizes[name] = parse_size(size, "max_memory")
    return sizes


def parse_size(text: str, name: str) -> int:
    """Bytes: `2GiB`, `1500MB`, `1.5 gb`, or a plain number of bytes. name: of the setting, for the error."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ModelError(f"{name}: {text.strip()!r} is not a size such as 2GiB or 1500MB")
    exact = float(match[1]) * _UNITS[(match[2] or "").upper()]
    if not exact < 2**63:
        raise ModelError(f"{name}: no machine has so much memory")
    size = int(exact)
    if size < 1:
        raise ModelError(f"{name}: {text.strip()!r} is no memory at all")
    return size
