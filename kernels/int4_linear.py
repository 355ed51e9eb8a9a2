"""Products with 4-bit weights: how torch's CPU operator lays integers out, and calling it.

A weight is (q - 8) * scale + zero, q from 0 to 15, with a bfloat16 scale and zero for each group of `group_size`
integers along the input. torch's operator packs two of them into a byte, in an order that depends on the vector
instructions of the CPU (ATen/native/cpu/int4mm_kernel.cpp); the same orders are written here as plain views, so that
weights can be packed and read back a few rows at a time, on any device, with one byte per integer on the way.
Knows nothing of modules, files or how integers are chosen.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

ROWS = 64
"""Packed weights have a multiple of so many rows; so many rows are packed apart from the others in every layout."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Bytes are [rows / block, in_features, block / 2]: one byte holds two rows' integers of the same column."""

    name: str
    block: int
    """Rows that lie side by side."""
    has_neighbours: bool
    """Whether a byte holds rows 2i and 2i + 1 of a block, instead of rows i and i + block / 2."""

    def pack(self, integers: Tensor) -> Tensor:
        """integers: [rows, in_features] uint8, 0 to 15, rows a multiple of 64. [rows, in_features / 2] uint8."""
        rows, columns = integers.shape
        half = self.block // 2
        shape = (-1, half, 2, columns) if self.has_neighbours else (-1, 2, half, columns)
        low, high = integers.view(shape).unbind(2 if self.has_neighbours else 1)
        return (low | (high << 4)).transpose(1, 2).contiguous().view(rows, columns // 2)

    def unpack(self, packed: Tensor) -> Tensor:
        """What `pack` was given; any multiple of 64 rows from any multiple of 64 on."""
        rows, columns = packed.shape[0], packed.shape[1] * 2
        blocks = packed.view(rows // self.block, columns, self.block // 2)
        parts = torch.stack((blocks & 15, blocks >> 4), dim=3 if self.has_neighbours else 2)
        return parts.view(-1, columns, self.block).transpose(1, 2).reshape(rows, columns)


LAYOUTS = (Layout("64-halves", 64, False), Layout("32-halves", 32, False), Layout("32-pairs", 32, True))
"""Of CPUs with AVX512, with AVX2, and all others."""


@cache
def cpu_layout() -> Layout | None:
    """What the operator reads on this CPU: it is asked. None where it is not there or has a layout unknown here."""
    integers = torch.arange(ROWS * 32, dtype=torch.int32).mul_(7).remainder_(16).view(ROWS, 32)
    integers = (integers + integers.T.reshape(ROWS, 32)) % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
    except (RuntimeError, AttributeError):
        return None
    small = integers.to(torch.uint8)
    return next((layout for layout in LAYOUTS if torch.equal(layout.pack(small), packed)), None)


def int4_linear(x: Tensor, packed: Tensor, group_size: int, scales_and_zeros: Tensor) -> Tensor:
    """[r, rows] bfloat16 = x [r, in_features] bfloat16 times the weight, summed in float32 one input after another.

    packed: in `cpu_layout`; scales_and_zeros: [in_features / group_size, rows, 2] bfloat16; group_size 32, 64 or 128.
    A row's result depends neither on the other rows nor on the number of threads (measured, 1 to 600 rows).
    """
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales_and_zeros)
    return y
