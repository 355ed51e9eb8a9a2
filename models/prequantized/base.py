"""What a reader of one format says about a checkpoint: which weights it stands for, and what each is made of.

Knows no format.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from cadenza.models.prequantized.lattice import Lattice

Parts = Mapping[str, Tensor]
"""The stored tensors of one weight by their last names, such as qweight and scales."""


@dataclass(frozen=True)
class Stored:
    """One weight as it is stored."""

    names: Mapping[str, str]
    """The checkpoint's name of each part."""
    shape: tuple[int, ...]
    read: Callable[[Parts], Lattice]


@dataclass(frozen=True)
class Format:
    """What the configuration of a checkpoint says, understood."""

    label: str
    """For a person: method, bits, groups."""
    bits: int
    """Of one weight."""
    weights: Callable[[Parts], Mapping[str, Stored]]
    """From the checkpoint's tensors by name to its quantized weights by the names of the float ones."""
    ignored: tuple[str, ...] = ()
    """Last names of tensors that may be left unread: what only another way of computing needs."""
    group_size: int | None = None
    """Inputs that share a scale, where that is one number; None: all of a row, or various."""
    is_reordered: bool = False
    """Groups are of inputs that do not lie together (act-order)."""


def layers_with(stored: Iterable[str], marker: str) -> list[str]:
    """The layers below which there is a tensor called `marker`; with a dot at their end."""
    return [name[: -len(marker)] for name in stored if name.endswith(f".{marker}")]


def parts_of(stored: Parts, layer: str, *names: str) -> dict[str, str]:
    """Those of the names that the layer has, with their names in the checkpoint."""
    return {name: layer + name for name in names if layer + name in stored}
