"""Memory for the low-rank changes of one linear layer, of all adapters that have a slot.

On a CPU it is asked for as a whole and taken page by page as slots are filled, and given back as they are emptied.
"""

import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadenza.kernels.lora import PLANE, num_planes
from cadenza.models.adapters.adapter import LowRank
from cadenza.models.adapters.layout import Layout


def slot_bytes(layout: Layout, num_slots: int, max_rank: int, dtype: torch.dtype) -> int:
    """What tables take for all of a model's linear layers but the output layer, when every slot is full."""
    sites = [
        site
        for name, site in layout.sites.items()
        if site.kind == "linear" and name != layout.output_embedding
    ]
    width = sum(site.in_features + site.out_features for site in sites)
    return num_slots * num_planes(max_rank) * PLANE * width * dtype.itemsize


class PlaneTables:
    """A as [planes · in_features, 16] and B as [planes · 16, out_features]; a slot has `per_slot` planes in a row."""

    def __init__(
        self,
        num_slots: int,
        per_slot: int,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._per_slot = per_slot
        self._a = _Table(num_slots, (per_slot * in_features, PLANE), dtype, device)
        self._b = _Table(num_slots, (per_slot * PLANE, out_features), dtype, device)
        self.a, self.b = self._a.tensor, self._b.tensor
        self._in_features = in_features

    def put(self, slot: int, change: LowRank) -> None:
        """Bring a change into a slot; its last plane is padded with zeros."""
        rank = change.rank
        first = slot * self._per_slot
        planes = num_planes(rank)
        a = self.a.view(-1, self._in_features, PLANE)[first : first + planes]
        b = self.b.view(-1, PLANE, self.b.shape[1])[first : first + planes].view(planes * PLANE, -1)
        for plane in range(planes):
            part = change.a[plane * PLANE : (plane + 1) * PLANE]
            a[plane, :, : len(part)].copy_(part.T)
            a[plane, :, len(part) :].zero_()
        b[:rank].copy_(change.b.T)
        b[rank:].zero_()

    def clear(self, slot: int) -> None:
        """The slot's content is of no more use."""
        for table in (self._a, self._b):
            table.give_back(slot)


class _Table:
    def __init__(
        self, num_slots: int, slot_shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """One slot below the other."""
        rows, width = slot_shape
        shape = (num_slots * rows, width)
        self._slot_bytes = rows * width * dtype.itemsize
        self._memory: Any = None
        self.tensor: Tensor
        if device.type != "cpu":
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
            return
        self._memory = mmap.mmap(
            -1, num_slots * self._slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        flat = torch.from_numpy(np.frombuffer(self._memory, np.uint8))
        self.tensor = flat.view(dtype).view(shape)

    def give_back(self, slot: int) -> None:
        """Return the slot's memory, as far as it fills pages, to the system."""
        if self._memory is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start, page = slot * self._slot_bytes, mmap.PAGESIZE
        first = -(-start // page) * page
        length = (start + self._slot_bytes) // page * page - first
        if length > 0:
            self._memory.madvise(mmap.MADV_DONTNEED, first, length)
