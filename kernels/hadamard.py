"""Blocks of activations times a Hadamard matrix, on GPUs, in Triton: what 8-bit weights that were rotated are given.

    y[m, b * S + j] = factor * Σ_i x[m, b * S + i] * H[i, j],     H[i, j] = (-1)^popcount(i & j)

which is Sylvester's matrix of size S, 16, 32 or 64, as QuaRot (Ashkboos et al. 2024) rotates. Its ±1 are exact in
bfloat16, so that tensor cores sum in float32 what is rounded once. They are made from their indices: nothing but the
rows is read, in one launch, where casts and a library's product would be four.

A program computes 32 blocks; which rows they are of does not matter to it, so that a row has the same bits in any
batch. Knows nothing of weights. Everything is on the current device. Imports Triton: import it where there is a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cadenza.kernels.few_rows import dot
from cadenza.kernels.ops import is_interpreted

SIZES = (16, 32, 64)
BLOCKS = 32
"""Per program; 64 would be computed by another instruction."""
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def rotate_blocks(x: Tensor, size: int, factor: float) -> Tensor:
    """x: [..., k] float32, bfloat16 or float16, contiguous, k a multiple of `size`. The same shape and dtype."""
    assert size in SIZES
    assert x.shape[-1] % size == 0
    assert x.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_blocks = x.numel() // size
    if num_blocks:
        _rotate_blocks_kernel[(-(-num_blocks // BLOCKS),)](
            *(x, out, num_blocks, factor, BLOCKS, size, is_interpreted(x)), **_OPTIONS
        )
    return out


def rotate_blocks_reference(x: Tensor, size: int, factor: float) -> Tensor:
    """`rotate_blocks` in plain torch, in the dtype of x (float64 for a truth)."""
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    y: Tensor = (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2) * factor
    return y


def rotate_blocks_bytes(x: Tensor) -> int:
    """What memory must move: the rows there and back."""
    return 2 * x.nbytes


@triton.jit(do_not_specialize=["num_blocks", "factor"])  # type: ignore[untyped-decorator]
def _rotate_blocks_kernel(  # type: ignore[no-untyped-def]
    x, out, num_blocks, factor, BLOCKS: tl.constexpr, SIZE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program: BLOCKS blocks."""
    block = tl.arange(0, BLOCKS) + tl.program_id(0) * BLOCKS
    column = tl.arange(0, SIZE)
    at = block.to(tl.int64)[:, None] * SIZE + column[None, :]
    is_ours = (block < num_blocks)[:, None]
    rows = tl.load(x + at, mask=is_ours, other=0.0)
    common = column[:, None] & column[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    matrix = tl.where((common & 1) == 1, -1.0, 1.0).to(tl.bfloat16)
    total = dot(rows, matrix, tl.full((BLOCKS, SIZE), 0.0, tl.float32), INTERPRETED) * factor
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_ours)
